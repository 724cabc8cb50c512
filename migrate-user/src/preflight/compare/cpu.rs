//! The processor that the guest believes to have.

use std::collections::BTreeSet;

use super::super::cpuid::missing;
use super::{Check, DestinationFacts, Finding, Hosts, SourceFacts};
use crate::vmm::CpuFacts;

/// Frequencies that differ by less are the same (`tsc_tolerance_ppm` of the kernel's KVM, its default), ppm.
const TSC_TOLERANCE: u64 = 250;

pub(super) fn compare(source: &SourceFacts, destination: &DestinationFacts) -> Vec<Finding> {
    let hosts = Hosts { source: &source.host.name, destination: &destination.host.name };
    let (here, there) = (&source.machine.cpu, &destination.machine.cpu);
    vec![model(hosts, here, there), features(hosts, here, there), tsc(hosts, source, destination)]
}

fn model(hosts: Hosts<'_>, source: &CpuFacts, destination: &CpuFacts) -> Finding {
    let describe = |cpu: &CpuFacts| {
        let [family, model, stepping] = cpu.signature;
        format!("{} ({} {family}/{model}/{stepping}, {} address bits)", cpu.model, cpu.vendor, cpu.phys_bits)
    };
    let found = hosts.both(describe(source), describe(destination));
    let remedy = "give the same -cpu with a named model in both definitions (`qemu-system-x86_64 -cpu help`)";
    if source.vendor != destination.vendor {
        return Finding::bad(Check::CpuModel, format!("the processor's vendor differs: {found}"), remedy);
    }
    if source.phys_bits > destination.phys_bits {
        let found = format!("physical addresses are narrower on {}: {found}", hosts.destination);
        return Finding::bad(Check::CpuModel, found, "give the same phys-bits=… to -cpu in both definitions");
    }
    if (&source.model, source.signature) != (&destination.model, destination.signature) {
        let remedy = format!("the guest may see its processor change, which some software minds: {remedy}");
        return Finding::warning(Check::CpuModel, found, remedy);
    }
    Finding::good(Check::CpuModel, describe(source))
}

fn features(hosts: Hosts<'_>, source: &CpuFacts, destination: &CpuFacts) -> Finding {
    let (Some(here), Some(there)) = (&source.words, &destination.words) else {
        return Finding::unknown(
            Check::CpuFeatures,
            "QEMU does not tell the features of its vCPUs",
            "see by hand that the destination's processor has all that the guest uses",
        );
    };
    let mut lost = missing(here, there);
    lost.extend(source.named.difference(&destination.named).cloned());
    let mut gained = missing(there, here);
    gained.extend(destination.named.difference(&source.named).cloned());
    if !lost.is_empty() {
        return lacking(hosts, &lost, &missing(&destination.filtered, &[]));
    }
    let count: u32 = here.iter().map(|word| word.bits.count_ones()).sum();
    if gained.is_empty() {
        let count = count as usize + source.named.len();
        return Finding::good(
            Check::CpuFeatures,
            format!("all {count} that the guest sees are on both hosts"),
        );
    }
    Finding::warning(
        Check::CpuFeatures,
        format!("{} has features that the guest does not know of: {}", hosts.destination, list(&gained)),
        "harmless until the guest looks again, and then it cannot go back: give the same -cpu with a named model in both definitions",
    )
}

/// `denied` is what the destination was asked for and could not give.
fn lacking(hosts: Hosts<'_>, lost: &BTreeSet<String>, denied: &BTreeSet<String>) -> Finding {
    let asked: BTreeSet<String> = lost.intersection(denied).cloned().collect();
    let remedy = if asked.is_empty() {
        "give the same -cpu with a named model in both definitions, one that both processors have in full"
            .to_owned()
    } else {
        format!(
            "its processor, or its KVM, cannot give {}: start the VM on {} with a -cpu that both hosts have in full, or migrate \
             to another host",
            list(&asked),
            hosts.source
        )
    };
    Finding::bad(
        Check::CpuFeatures,
        format!("{} lacks features that the guest was started with: {}", hosts.destination, list(lost)),
        remedy,
    )
}

fn list(names: &BTreeSet<String>) -> String {
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    names.join(", ")
}

fn tsc(hosts: Hosts<'_>, source: &SourceFacts, destination: &DestinationFacts) -> Finding {
    if source.machine.accelerator != "kvm" {
        return Finding::good(Check::Tsc, "emulated: it does not depend on the host");
    }
    let (here, there) = (source.machine.cpu.tsc_hz, destination.machine.cpu.tsc_hz);
    if here == 0 || there == 0 {
        return Finding::unknown(Check::Tsc, "QEMU does not tell the frequency", "");
    }
    let mhz = |hz: u64| format!("{:.3} MHz", hz as f64 / 1e6);
    let invariant = if has_invtsc(&source.machine.cpu) { ", invtsc" } else { "" };
    if here.abs_diff(there) <= here / 1_000_000 * TSC_TOLERANCE {
        return Finding::good(Check::Tsc, format!("{}{invariant}", mhz(here)));
    }
    let found = format!("the TSC runs at {}{invariant}", hosts.both(mhz(here), mhz(there)));
    if destination.host.tsc_scaling {
        return Finding::good(Check::Tsc, format!("{found}, whose processor can scale it"));
    }
    let remedy = format!(
        "the processor of {} cannot scale it: a guest that takes its time from the TSC runs too fast or too slow; use kvmclock in \
         the guest, or migrate to a host of the same frequency",
        hosts.destination
    );
    // A guest with an invariant TSC was promised that this never happens; others take it as a hint at most.
    if invariant.is_empty() {
        Finding::warning(Check::Tsc, found, remedy)
    } else {
        Finding::bad(Check::Tsc, found, remedy)
    }
}

/// CPUID 8000_0007H:EDX, bit 8.
fn has_invtsc(cpu: &CpuFacts) -> bool {
    let words = cpu.words.as_deref().unwrap_or_default();
    words.iter().any(|word| (word.leaf, &*word.register) == (0x8000_0007, "EDX") && word.bits >> 8 & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{found, says};
    use super::*;
    use crate::{preflight::Verdict, vmm::FeatureWord};

    fn word(leaf: u32, register: &str, bits: u32) -> FeatureWord {
        FeatureWord { leaf, subleaf: Some(0), register: register.into(), bits }
    }

    #[test]
    fn missing_features_are_named_and_can_be_forced() {
        let lost = found(Check::CpuFeatures, |_, b, _| b.machine.cpu.words = Some(vec![word(7, "EBX", 1)]));
        says(&lost, Verdict::Bad, &["host-b lacks", "avx2", "named model"]);
        assert!(lost.overridable && !lost.found.contains("fsgsbase"));
        let denied = found(Check::CpuFeatures, |_, b, _| {
            b.machine.cpu.words = Some(vec![]);
            b.machine.cpu.filtered = vec![word(7, "EBX", 1 << 5)];
        });
        says(&denied, Verdict::Bad, &["fsgsbase", "cannot give avx2: start the VM on host-a"]);
    }

    #[test]
    fn features_beyond_cpuid_count_too() {
        let lost = found(Check::CpuFeatures, |a, _, _| {
            a.machine.cpu.named.insert("rdctl-no".into());
        });
        says(&lost, Verdict::Bad, &["rdctl-no"]);
        let gained = found(Check::CpuFeatures, |_, b, _| {
            b.machine.cpu.named.insert("hv-time".into());
        });
        says(&gained, Verdict::Warning, &["host-b has", "hv-time", "cannot go back"]);
    }

    #[test]
    fn features_that_are_not_told_are_a_reason_to_stay() {
        let untold = found(Check::CpuFeatures, |a, _, _| a.machine.cpu.words = None);
        says(&untold, Verdict::Unknown, &["does not tell", "by hand"]);
        assert!(untold.refuses() && untold.overridable);
    }

    #[test]
    fn models() {
        let intel = found(Check::CpuModel, |_, b, _| b.machine.cpu.vendor = "GenuineIntel".into());
        says(&intel, Verdict::Bad, &["vendor differs", "AuthenticAMD", "GenuineIntel", "named model"]);
        assert!(intel.overridable);
        let narrow = found(Check::CpuModel, |_, b, _| b.machine.cpu.phys_bits = 40);
        says(&narrow, Verdict::Bad, &["narrower on host-b", "phys-bits"]);
        let stepping = found(Check::CpuModel, |_, b, _| b.machine.cpu.signature[2] = 3);
        says(&stepping, Verdict::Warning, &["23/1/2", "23/1/3"]);
    }

    #[test]
    fn frequencies() {
        let close = found(Check::Tsc, |_, b, _| b.machine.cpu.tsc_hz += 100_000);
        says(&close, Verdict::Good, &["2500.000 MHz"]);
        let slow = |scaling: bool, invariant: bool| {
            found(Check::Tsc, |a, b, _| {
                b.machine.cpu.tsc_hz = 2_000_000_000;
                b.host.tsc_scaling = scaling;
                if invariant {
                    a.machine.cpu.words = Some(vec![word(0x8000_0007, "EDX", 1 << 8)]);
                }
            })
        };
        says(&slow(true, true), Verdict::Good, &["can scale it"]);
        says(&slow(false, false), Verdict::Warning, &["2000.000 MHz on host-b", "kvmclock"]);
        says(&slow(false, true), Verdict::Bad, &["invtsc", "cannot scale"]);
        assert!(slow(false, true).overridable);
        let tcg = found(Check::Tsc, |a, _, _| a.machine.accelerator = "tcg".into());
        says(&tcg, Verdict::Good, &["emulated"]);
        let untold = found(Check::Tsc, |a, _, _| a.machine.cpu.tsc_hz = 0);
        assert!(untold.verdict == Verdict::Unknown && !untold.refuses());
    }
}
