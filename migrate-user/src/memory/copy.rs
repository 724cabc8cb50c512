//! Copies that leave no trace in the cache.

/// Bytes from which on a copy past the cache is worth its fence.
#[cfg(target_arch = "x86_64")]
const WORTH_IT: usize = 1024;
/// A cache line, bytes.
#[cfg(target_arch = "x86_64")]
const LINE: usize = 64;

/// Copies `len` bytes to where nobody looks for them soon, as a guest's memory on its way is: past the cache, without first
/// reading what they overwrite. Twice as fast as `memcpy` (docs/performance.md, "One core, in memory"). When it returns, the bytes are as visible
/// to others as any write.
///
/// # Safety
/// Both ranges are valid for `len` bytes, and do not overlap.
pub(super) unsafe fn past_the_cache(from: *const u8, to: *mut u8, len: usize) {
    #[cfg(target_arch = "x86_64")]
    if len >= WORTH_IT {
        let head = to.align_offset(LINE);
        let lines = (len - head) / LINE;
        let tail = head + lines * LINE;
        // SAFETY: head, lines and tail make up `len` bytes; `to + head` is aligned to a line.
        unsafe {
            std::ptr::copy_nonoverlapping(from, to, head);
            stream(from.add(head), to.add(head), lines);
            std::ptr::copy_nonoverlapping(from.add(tail), to.add(tail), len - tail);
        }
        return;
    }
    // SAFETY: as promised by the caller.
    unsafe { std::ptr::copy_nonoverlapping(from, to, len) }
}

/// Copies `lines` cache lines by non-temporal stores of SSE2, which every x86-64 has; wider ones are no faster.
///
/// # Safety
/// Both ranges are valid for as many lines, do not overlap, and `to` is aligned to a line.
#[cfg(target_arch = "x86_64")]
unsafe fn stream(from: *const u8, to: *mut u8, lines: usize) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_sfence, _mm_stream_si128};
    let (from, to): (*const __m128i, *mut __m128i) = (from.cast(), to.cast());
    for line in 0..lines {
        let at = line * (LINE / size_of::<__m128i>());
        // SAFETY: in bounds, as promised. Four stores fill a line, so that it leaves whole.
        unsafe {
            let parts = [
                _mm_loadu_si128(from.add(at)),
                _mm_loadu_si128(from.add(at + 1)),
                _mm_loadu_si128(from.add(at + 2)),
                _mm_loadu_si128(from.add(at + 3)),
            ];
            for (index, part) in parts.into_iter().enumerate() {
                _mm_stream_si128(to.add(at + index), part);
            }
        }
    }
    // Such stores are not ordered with others: whoever is told of these bytes by an ordinary one must see them.
    // SAFETY: of SSE, as the stores.
    unsafe { _mm_sfence() };
}

#[cfg(test)]
mod tests {
    use super::past_the_cache;

    #[test]
    fn every_byte_arrives_and_no_other_changes_at_any_alignment() {
        let from: Vec<u8> = (0..9000).map(|at| (at * at / 13) as u8).collect();
        for len in [0, 1, 63, 64, 1023, 1024, 1025, 1087, 1088, 4096, 8192] {
            for (source, target) in [(0, 0), (1, 0), (0, 1), (50, 16), (7, 63), (63, 64), (33, 99)] {
                let mut to = vec![0xa5; 9000];
                // SAFETY: both vectors are longer than offset and length together, and are not the same.
                unsafe { past_the_cache(from.as_ptr().add(source), to.as_mut_ptr().add(target), len) };
                assert_eq!(to[target..target + len], from[source..source + len], "{len}, {source}, {target}");
                assert!(to[..target].iter().chain(&to[target + len..]).all(|&byte| byte == 0xa5));
            }
        }
    }
}
