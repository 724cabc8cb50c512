//! How the control channel is secured.

use super::{Check, Finding};
use crate::pki::{Certified, WARN_DAYS};

/// By the certificates of both ends, this host's first; `None` where there are none.
pub fn control_channel(certificates: Option<[&Certified; 2]>) -> Finding {
    let Some(certificates) = certificates else {
        return Finding::warning(
            Check::ControlChannel,
            "neither authenticated nor encrypted (insecure = true)",
            "give both hosts certificates (`xferry pki`), unless nobody else can reach their network",
        );
    };
    let found: Vec<String> = certificates
        .iter()
        .map(|certificate| format!("{} until {}", certificate.name, certificate.expires.date()))
        .collect();
    let found = format!("TLS 1.3, certificates of {}", found.join(" and "));
    let ending: Vec<String> = certificates
        .iter()
        .filter(|certificate| certificate.ends_soon())
        .map(|certificate| format!("{} ({} days left)", certificate.name, certificate.days_left()))
        .collect();
    if ending.is_empty() {
        return Finding::good(Check::ControlChannel, found);
    }
    let remedy = format!(
        "issue a new one within {WARN_DAYS} days of its end (`xferry pki issue`): {}",
        ending.join(", ")
    );
    Finding::warning(Check::ControlChannel, found, remedy)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::preflight::Verdict;
    use time::{Duration, OffsetDateTime};

    #[test]
    fn what_is_insecure_or_ends_soon_is_a_drawback() {
        let certificate = |name: &str, days| Certified {
            name: name.into(),
            expires: OffsetDateTime::now_utc() + Duration::days(days) + Duration::hours(1),
        };
        let (a, b, old) = (certificate("host-a", 90), certificate("host-b", 31), certificate("host-c", 29));
        let good = control_channel(Some([&a, &b]));
        assert!(good.verdict == Verdict::Good && good.found.contains("host-a until 2"), "{good:?}");
        let ending = control_channel(Some([&a, &old]));
        assert!(ending.verdict == Verdict::Warning && ending.remedy.contains("host-c (29 days left)"));
        assert!(!ending.remedy.contains("host-a") && !ending.refuses());
        let none = control_channel(None);
        assert!(none.verdict == Verdict::Warning && none.found.contains("insecure = true"));
    }
}
