#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| xferry::fuzzing::maps(data));
