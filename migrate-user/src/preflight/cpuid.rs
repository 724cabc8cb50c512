//! Names of CPUID features, as QEMU's `-cpu` calls them.
//!
//! QEMU tells bits, not names. Which bit a name sets was found out with QEMU 10.0.2 under TCG: every name was
//! switched on alone (`-cpu base,x-force-features=on,NAME=on`), and `feature-words` looked at. Two words cannot be set
//! that way and are as in `feature_word_info` of QEMU's target/i386/cpu.c: KVM's (leaf 4000_0001H, in which two bits
//! are called `kvmclock`) and SVM's (8000_000AH). The components of the XSAVE state (leaf 0DH) have no names there:
//! theirs are ours.

use std::collections::BTreeSet;

use crate::vmm::FeatureWord;

/// One register of one leaf: leaf, subleaf, register, and the names of its bits.
type Names = (u32, u32, &'static str, &'static [(u32, &'static str)]);

/// The name of a bit; its place where it has none.
fn name(word: &FeatureWord, bit: u32) -> String {
    let subleaf = word.subleaf.unwrap_or(0);
    NAMES
        .iter()
        .find(|(leaf, sub, register, _)| (*leaf, *sub, *register) == (word.leaf, subleaf, &*word.register))
        .and_then(|(.., names)| names.iter().find(|(number, _)| *number == bit))
        .map_or_else(
            || format!("CPUID {:#x}:{subleaf} {} bit {bit}", word.leaf, word.register),
            |(_, name)| (*name).to_owned(),
        )
}

/// Names of the features in `words` that are not in `others`.
pub(super) fn missing(words: &[FeatureWord], others: &[FeatureWord]) -> BTreeSet<String> {
    let place = |word: &FeatureWord| (word.leaf, word.subleaf.unwrap_or(0), word.register.clone());
    let mut names = BTreeSet::new();
    for word in words {
        let there = others.iter().find(|other| place(other) == place(word)).map_or(0, |other| other.bits);
        let gone = word.bits & !there;
        names.extend((0..u32::BITS).filter(|bit| gone >> bit & 1 == 1).map(|bit| name(word, bit)));
    }
    names
}

#[rustfmt::skip]
const NAMES: &[Names] = &[
    (0x1, 0, "ECX", &[
        (0, "sse3"), (1, "pclmulqdq"), (2, "dtes64"), (3, "monitor"), (4, "ds-cpl"), (5, "vmx"),
        (6, "smx"), (7, "est"), (8, "tm2"), (9, "ssse3"), (10, "cid"), (12, "fma"), (13, "cx16"),
        (14, "xtpr"), (15, "pdcm"), (17, "pcid"), (18, "dca"), (19, "sse4.1"), (20, "sse4.2"),
        (21, "x2apic"), (22, "movbe"), (23, "popcnt"), (24, "tsc-deadline"), (25, "aes"),
        (26, "xsave"), (28, "avx"), (29, "f16c"), (30, "rdrand"), (31, "hypervisor"),
    ]),
    (0x1, 0, "EDX", &[
        (0, "fpu"), (1, "vme"), (2, "de"), (3, "pse"), (4, "tsc"), (5, "msr"), (6, "pae"),
        (7, "mce"), (8, "cx8"), (9, "apic"), (11, "sep"), (12, "mtrr"), (13, "pge"), (14, "mca"),
        (15, "cmov"), (16, "pat"), (17, "pse36"), (18, "pn"), (19, "clflush"), (21, "ds"),
        (22, "acpi"), (23, "mmx"), (24, "fxsr"), (25, "sse"), (26, "sse2"), (27, "ss"), (28, "ht"),
        (29, "tm"), (30, "ia64"), (31, "pbe"),
    ]),
    (0x6, 0, "EAX", &[
        (2, "arat"),
    ]),
    (0x7, 0, "EBX", &[
        (0, "fsgsbase"), (1, "tsc-adjust"), (2, "sgx"), (3, "bmi1"), (4, "hle"), (5, "avx2"),
        (6, "fdp-excptn-only"), (7, "smep"), (8, "bmi2"), (9, "erms"), (10, "invpcid"), (11, "rtm"),
        (13, "zero-fcs-fds"), (14, "mpx"), (16, "avx512f"), (17, "avx512dq"), (18, "rdseed"),
        (19, "adx"), (20, "smap"), (21, "avx512ifma"), (22, "pcommit"), (23, "clflushopt"),
        (24, "clwb"), (25, "intel-pt"), (26, "avx512pf"), (27, "avx512er"), (28, "avx512cd"),
        (29, "sha-ni"), (30, "avx512bw"), (31, "avx512vl"),
    ]),
    (0x7, 0, "ECX", &[
        (1, "avx512vbmi"), (2, "umip"), (3, "pku"), (5, "waitpkg"), (6, "avx512vbmi2"), (8, "gfni"),
        (9, "vaes"), (10, "vpclmulqdq"), (11, "avx512vnni"), (12, "avx512bitalg"),
        (14, "avx512-vpopcntdq"), (16, "la57"), (22, "rdpid"), (24, "bus-lock-detect"),
        (25, "cldemote"), (27, "movdiri"), (28, "movdir64b"), (31, "pks"),
    ]),
    (0x7, 0, "EDX", &[
        (2, "avx512-4vnniw"), (3, "avx512-4fmaps"), (4, "fsrm"), (8, "avx512-vp2intersect"),
        (10, "md-clear"), (14, "serialize"), (16, "tsx-ldtrk"), (19, "arch-lbr"), (22, "amx-bf16"),
        (23, "avx512-fp16"), (24, "amx-tile"), (25, "amx-int8"), (26, "spec-ctrl"), (27, "stibp"),
        (28, "flush-l1d"), (29, "arch-capabilities"), (30, "core-capability"), (31, "ssbd"),
    ]),
    (0x7, 1, "EAX", &[
        (0, "sha512"), (1, "sm3"), (2, "sm4"), (4, "avx-vnni"), (5, "avx512-bf16"), (7, "cmpccxadd"),
        (10, "fzrm"), (11, "fsrs"), (12, "fsrc"), (18, "lkgs"), (19, "wrmsrns"), (21, "amx-fp16"),
        (23, "avx-ifma"), (26, "lam"),
    ]),
    (0x7, 1, "EDX", &[
        (4, "avx-vnni-int8"), (5, "avx-ne-convert"), (8, "amx-complex"), (10, "avx-vnni-int16"),
        (14, "prefetchiti"),
    ]),
    (0x7, 2, "EDX", &[
        (0, "intel-psfd"), (1, "ipred-ctrl"), (2, "rrsba-ctrl"), (3, "ddpd-u"), (4, "bhi-ctrl"),
        (5, "mcdt-no"),
    ]),
    (0xd, 0, "EAX", &[
        (0, "xsave-x87"), (1, "xsave-sse"), (2, "xsave-avx"), (3, "xsave-bndregs"),
        (4, "xsave-bndcsr"), (5, "xsave-opmask"), (6, "xsave-zmm-hi256"), (7, "xsave-hi16-zmm"),
        (9, "xsave-pkru"), (17, "xsave-xtilecfg"), (18, "xsave-xtiledata"),
    ]),
    (0xd, 1, "EAX", &[
        (0, "xsaveopt"), (1, "xsavec"), (2, "xgetbv1"), (3, "xsaves"), (4, "xfd"),
    ]),
    (0x4000_0001, 0, "EAX", &[
        (0, "kvmclock"), (1, "kvm-nopiodelay"), (2, "kvm-mmu"), (3, "kvmclock"), (4, "kvm-asyncpf"),
        (5, "kvm-steal-time"), (6, "kvm-pv-eoi"), (7, "kvm-pv-unhalt"), (9, "kvm-pv-tlb-flush"),
        (10, "kvm-asyncpf-vmexit"), (11, "kvm-pv-ipi"), (12, "kvm-poll-control"),
        (13, "kvm-pv-sched-yield"), (14, "kvm-asyncpf-int"), (15, "kvm-msi-ext-dest-id"),
        (24, "kvmclock-stable-bit"),
    ]),
    (0x4000_0001, 0, "EDX", &[
        (0, "kvm-hint-dedicated"),
    ]),
    (0x8000_0001, 0, "ECX", &[
        (0, "lahf-lm"), (1, "cmp-legacy"), (2, "svm"), (3, "extapic"), (4, "cr8legacy"), (5, "abm"),
        (6, "sse4a"), (7, "misalignsse"), (8, "3dnowprefetch"), (9, "osvw"), (10, "ibs"),
        (11, "xop"), (12, "skinit"), (13, "wdt"), (15, "lwp"), (16, "fma4"), (17, "tce"),
        (19, "nodeid-msr"), (21, "tbm"), (22, "topoext"), (23, "perfctr-core"), (24, "perfctr-nb"),
    ]),
    (0x8000_0001, 0, "EDX", &[
        (11, "syscall"), (20, "nx"), (22, "mmxext"), (25, "fxsr-opt"), (26, "pdpe1gb"),
        (27, "rdtscp"), (29, "lm"), (30, "3dnowext"), (31, "3dnow"),
    ]),
    (0x8000_0007, 0, "EBX", &[
        (0, "overflow-recov"), (1, "succor"),
    ]),
    (0x8000_0007, 0, "EDX", &[
        (8, "invtsc"),
    ]),
    (0x8000_0008, 0, "EBX", &[
        (0, "clzero"), (2, "xsaveerptr"), (9, "wbnoinvd"), (12, "ibpb"), (14, "ibrs"),
        (15, "amd-stibp"), (17, "stibp-always-on"), (24, "amd-ssbd"), (25, "virt-ssbd"),
        (26, "amd-no-ssb"), (28, "amd-psfd"),
    ]),
    (0x8000_000a, 0, "EDX", &[
        (0, "npt"), (1, "lbrv"), (2, "svm-lock"), (3, "nrip-save"), (4, "tsc-scale"),
        (5, "vmcb-clean"), (6, "flushbyasid"), (7, "decodeassists"), (10, "pause-filter"),
        (12, "pfthreshold"), (13, "avic"), (15, "v-vmsave-vmload"), (16, "vgif"), (25, "vnmi"),
        (28, "svme-addr-chk"),
    ]),
    (0x8000_0021, 0, "EAX", &[
        (0, "no-nested-data-bp"), (2, "lfence-always-serializing"), (6, "null-sel-clr-base"),
        (8, "auto-ibrs"), (24, "eraps"), (27, "sbpb"), (28, "ibpb-brtype"), (29, "srso-no"),
        (30, "srso-user-kernel-no"),
    ]),
    (0x8000_0022, 0, "EAX", &[
        (0, "perfmon-v2"),
    ]),
    (0xc000_0001, 0, "EDX", &[
        (2, "xstore"), (3, "xstore-en"), (6, "xcrypt"), (7, "xcrypt-en"), (8, "ace2"),
        (9, "ace2-en"), (10, "phe"), (11, "phe-en"), (12, "pmm"), (13, "pmm-en"),
    ]),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn word(leaf: u32, subleaf: Option<u32>, register: &str, bits: u32) -> FeatureWord {
        FeatureWord { leaf, subleaf, register: register.into(), bits }
    }

    #[test]
    fn bits_have_their_names() {
        // Intel SDM: AVX2 is EBX bit 5 of leaf 7, AES is ECX bit 25 and FPU EDX bit 0 of leaf 1.
        let words = [word(7, Some(0), "EBX", 1 << 5), word(1, None, "ECX", 1 << 25), word(1, None, "EDX", 1)];
        let names: Vec<String> = missing(&words, &[]).into_iter().collect();
        assert_eq!(names, ["aes", "avx2", "fpu"]);
        let unnamed = missing(&[word(7, Some(9), "EBX", 1 << 3)], &[]);
        assert_eq!(unnamed.into_iter().next().as_deref(), Some("CPUID 0x7:9 EBX bit 3"));
    }

    #[test]
    fn only_what_the_other_lacks_is_named() {
        let here = [word(7, Some(0), "EBX", 0b10_0001)];
        assert!(missing(&here, &here).is_empty());
        // A word that the other QEMU does not know is all zeros there.
        assert_eq!(missing(&here, &[word(1, None, "EDX", u32::MAX)]).len(), 2);
        assert_eq!(missing(&here, &[word(7, Some(0), "EBX", 1)]).into_iter().next().as_deref(), Some("avx2"));
    }

    #[test]
    fn no_name_is_given_twice() {
        let mut seen = BTreeSet::new();
        for (_, _, _, names) in NAMES {
            for (bit, name) in *names {
                assert!(*bit < 32 && (seen.insert(name) || *name == "kvmclock"), "{name}");
            }
        }
    }
}
