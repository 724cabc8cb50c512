//! Findings for people.

use std::fmt::Write;

use super::{Finding, Outcome, Verdict, outcome};

/// One line for each finding, with the remedy under those that are not as they should be, and what it all means
/// above.
pub fn table(vm: &str, source: &str, destination: &str, findings: &[Finding]) -> String {
    let mut out = String::new();
    let refusing = findings.iter().filter(|finding| finding.refuses() && !finding.overridden).count();
    let headline = match outcome(findings) {
        Outcome::CanGo => format!("✓ {vm} can go from {source} to {destination}"),
        Outcome::Refused => {
            format!("✗ {vm} cannot go from {source} to {destination}: {refusing} reason(s) below")
        }
        Outcome::CouldNotTell => {
            format!("? whether {vm} can go from {source} to {destination} could not be told")
        }
    };
    // Writing to a String cannot fail.
    let _ = writeln!(out, "{headline}");
    let mut rows: Vec<&Finding> = findings.iter().collect();
    rows.sort_by_key(|finding| finding.check);
    let names: Vec<(String, &Finding)> = rows.into_iter().map(|row| (row.check.name(), row)).collect();
    let width = names.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    for (name, row) in names {
        let _ = writeln!(out, "  {} {name:width$}  {}", row.verdict.sign(), row.found);
        let indent = width + 6;
        if row.verdict != Verdict::Good && !row.remedy.is_empty() {
            let _ = writeln!(out, "{:indent$}→ {}", "", row.remedy);
        }
        if row.overridden {
            let _ = writeln!(out, "{:indent$}overridden by --force", "");
        } else if row.refuses() && row.overridable {
            let _ = writeln!(out, "{:indent$}--force overrides this", "");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::{Check, settle};
    use super::*;

    #[test]
    fn rows_are_aligned_and_remedies_follow() {
        let mut findings = vec![
            Finding::bad(Check::CpuFeatures, "host-b lacks avx2", "use a named model"),
            Finding::good(Check::VmState, "running"),
        ];
        let text = table("web", "host-a", "host-b", &findings);
        assert_eq!(
            text,
            "✗ web cannot go from host-a to host-b: 1 reason(s) below\n\
             \x20 ✓ vm-state      running\n\
             \x20 ✗ cpu-features  host-b lacks avx2\n\
             \x20                 → use a named model\n\
             \x20                 --force overrides this\n"
        );
        settle(&mut findings, true);
        let text = table("web", "host-a", "host-b", &findings);
        assert!(text.starts_with("✓ web can go") && text.contains("overridden by --force"), "{text}");
        let unknown = [Finding::unknown(Check::Peer, "no answer", "")];
        assert!(table("web", "a", "b", &unknown).starts_with("? whether web can go"));
    }
}
