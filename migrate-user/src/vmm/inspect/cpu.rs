//! What the guest's processor is.
//!
//! Two sources look as if they told which CPU features a guest has. `query-cpu-model-expansion` says what a CPU
//! *model* would have if it were made now: it knows nothing of what `-cpu` adds to it or takes away, nor of what
//! this host's kernel filtered out. The properties of the vCPU *object* (QOM) are what the guest reads by CPUID:
//! `feature-words` after all filtering, `filtered-features` with what was asked for and cannot be had. They exist
//! as soon as the VM's processors do, also in a QEMU that waits for a migration, so both sides are asked for the
//! same thing. QEMU's migration stream itself carries no CPUID, and does not notice a difference.
//!
//! `feature-words` has CPUID bits only (seen on QEMU 10.0.2: switching one of the others on changes no word). Features
//! that are announced in MSRs and Hyper-V enlightenments have a named property each. An answer takes QEMU 0.35 ms, and
//! there are 465 names: they are asked for only where a bit that implies them is set.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Qmp, QmpError, items, qom_get, qom_list, text};
use crate::files::{self, MAX_PROC};

/// 32 features: one register of one CPUID leaf.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct FeatureWord {
    /// EAX before the instruction.
    #[serde(alias = "cpuid-input-eax")]
    pub leaf: u32,
    /// ECX before it, where it matters.
    #[serde(alias = "cpuid-input-ecx", default)]
    pub subleaf: Option<u32>,
    /// Register of the answer, as `EBX`.
    #[serde(alias = "cpuid-register")]
    pub register: String,
    /// Its bits.
    #[serde(alias = "features")]
    pub bits: u32,
}

/// A vCPU.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CpuFacts {
    /// Model, as after `-cpu`.
    pub model: String,
    /// Vendor, as CPUID says it.
    pub vendor: String,
    /// Family, model and stepping, as CPUID says them.
    pub signature: [u64; 3],
    /// Width of physical addresses, bits.
    pub phys_bits: u64,
    /// Frequency of its time-stamp counter, Hz; 0 when there is none of its own (TCG).
    pub tsc_hz: u64,
    /// Features by CPUID; `None` when QEMU does not tell.
    pub words: Option<Vec<FeatureWord>>,
    /// Features that were asked for and that this host cannot give.
    pub filtered: Vec<FeatureWord>,
    /// Features that are not in CPUID, by name.
    pub named: BTreeSet<String>,
}

/// The first vCPU, and the places of all.
pub(super) async fn ask(qmp: &Qmp) -> Result<(CpuFacts, Vec<String>), QmpError> {
    let list = qmp.execute("query-cpus-fast", json!({})).await?;
    let vcpus = items(&list).map(|cpu| place(&cpu["props"])).collect();
    let path = text(&list[0]["qom-path"]);
    // What a processor of another architecture does not have stays empty, and is judged as not told.
    let get = async |property: &str| match qom_get(qmp, &path, property).await {
        Err(QmpError::Refused { .. }) => Ok(Value::Null),
        other => other,
    };
    let number = |value: Value| value.as_u64().unwrap_or(0);
    let words: Option<Vec<FeatureWord>> = serde_json::from_value(get("feature-words").await?).ok();
    let kind = text(&get("type").await?);
    Ok((
        CpuFacts {
            model: kind.split_once("-x86_64-cpu").map_or(kind.as_str(), |(model, _)| model).to_owned(),
            vendor: text(&get("vendor").await?),
            signature: [
                number(get("family").await?),
                number(get("model").await?),
                number(get("stepping").await?),
            ],
            phys_bits: number(get("phys-bits").await?),
            tsc_hz: number(get("tsc-frequency").await?),
            filtered: serde_json::from_value(get("filtered-features").await?).unwrap_or_default(),
            named: named(qmp, &path, words.as_deref().unwrap_or_default()).await?,
            words,
        },
        vcpus,
    ))
}

/// `{"core-id": 1, "socket-id": 0}` → `core 1 socket 0`.
fn place(props: &Value) -> String {
    let parts: Vec<String> = props
        .as_object()
        .into_iter()
        .flatten()
        .map(|(name, value)| format!("{} {value}", name.trim_end_matches("-id")))
        .collect();
    parts.join(" ")
}

/// Named features that are on.
async fn named(qmp: &Qmp, path: &str, words: &[FeatureWord]) -> Result<BTreeSet<String>, QmpError> {
    let command = files::read(format!("/proc/{}/cmdline", qmp.pid()), MAX_PROC).unwrap_or_default();
    let wanted = families(words, &String::from_utf8_lossy(&command));
    let mut on = BTreeSet::new();
    if wanted.is_empty() {
        return Ok(on);
    }
    for (name, kind) in qom_list(qmp, path).await? {
        let asked = kind == "bool" && wanted.iter().any(|prefix| name.starts_with(prefix));
        if asked && qom_get(qmp, path, &name).await? == true {
            on.insert(name);
        }
    }
    Ok(on)
}

/// Beginnings of the names that can be on at all.
fn families(words: &[FeatureWord], command: &str) -> Vec<&'static str> {
    let set = |leaf: u32, register: &str, bit: u32| {
        words.iter().any(|word| {
            word.leaf == leaf
                && word.subleaf.unwrap_or(0) == 0
                && word.register == register
                && word.bits >> bit & 1 == 1
        })
    };
    let mut families = Vec::new();
    // Intel SDM, volume 2, CPUID: VMX, PDCM, IA32_ARCH_CAPABILITIES, IA32_CORE_CAPABILITIES.
    if set(1, "ECX", 5) {
        families.push("vmx-");
    }
    if set(1, "ECX", 15) {
        families.push("full-width-write");
    }
    if set(7, "EDX", 29) {
        families.extend(ARCH_CAPABILITIES);
    }
    if set(7, "EDX", 30) {
        families.push("split-lock-detect");
    }
    // Only `-cpu` switches them on; a configuration file could hide it.
    if ["hv-", "hv_", "readconfig"].iter().any(|hint| command.contains(hint)) {
        families.push("hv-");
    }
    families
}

/// Bits of IA32_ARCH_CAPABILITIES by QEMU's names.
const ARCH_CAPABILITIES: [&str; 18] = [
    "rdctl-no",
    "ibrs-all",
    "rsba",
    "skip-l1dfl-vmentry",
    "ssb-no",
    "mds-no",
    "pschange-mc-no",
    "tsx-ctrl",
    "taa-no",
    "sbdr-ssdp-no",
    "fbsdp-no",
    "psdp-no",
    "fb-clear",
    "pbrsb-no",
    "gds-no",
    "rfds-no",
    "rfds-clear",
    "bhi-no",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qemus_words_are_read_and_travel() {
        let answer = json!([
            { "cpuid-register": "EBX", "cpuid-input-ecx": 0, "cpuid-input-eax": 7, "features": 32 },
            { "cpuid-register": "EDX", "cpuid-input-eax": 1, "features": 1 }
        ]);
        let words: Vec<FeatureWord> = serde_json::from_value(answer).unwrap();
        assert_eq!((words[0].leaf, words[0].subleaf, words[0].bits), (7, Some(0), 32));
        assert_eq!(words[1].subleaf, None);
        let again: Vec<FeatureWord> = serde_json::from_str(&serde_json::to_string(&words).unwrap()).unwrap();
        assert_eq!(again, words);
    }

    #[test]
    fn names_are_asked_for_only_where_they_can_be_on() {
        let word =
            |leaf, register: &str, bits| FeatureWord { leaf, subleaf: None, register: register.into(), bits };
        assert!(families(&[word(1, "EDX", u32::MAX)], "qemu -cpu host").is_empty());
        assert_eq!(families(&[word(1, "ECX", 1 << 5)], ""), ["vmx-"]);
        assert!(families(&[word(7, "EDX", 1 << 29)], "").contains(&"rdctl-no"));
        assert_eq!(families(&[], "-cpu host,hv_relaxed"), ["hv-"]);
    }

    #[test]
    fn places_in_words() {
        assert_eq!(
            place(&json!({ "core-id": 1, "socket-id": 0, "thread-id": 0 })),
            "core 1 socket 0 thread 0"
        );
    }
}
