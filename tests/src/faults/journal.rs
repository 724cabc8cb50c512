//! What an agent's journal says about who has the VM, read from outside; and how it is made longer.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// The file in an agent's state directory.
pub(super) fn path(state_dir: &Path) -> PathBuf {
    state_dir.join("handover.journal")
}

/// Adds a migration of long ago, of a VM whose name is `length` bytes long. Its agent must not run.
pub(super) fn append_past(path: &Path, session: u64, length: usize) -> Result<()> {
    let begun = json!({"record": "waiting", "session": session, "vm": "x".repeat(length)});
    let ended = json!({"record": "concluded", "session": session});
    let mut file = OpenOptions::new().append(true).open(path).context("opening a journal")?;
    file.write_all((line(&begun) + &line(&ended)).as_bytes()).context("writing to a journal")
}

fn line(record: &Value) -> String {
    let text = record.to_string();
    format!("{:08x} {text}\n", crc32c(text.as_bytes()))
}

/// CRC-32C (RFC 3720, appendix B.4), bit by bit.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |sum, &byte| {
        (0..8).fold(sum ^ u32::from(byte), |sum, _| (sum >> 1) ^ (0x82f6_3b78 & (sum & 1).wrapping_neg()))
    })
}

/// One session's records.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Session {
    /// This host is its source or its destination, and was not only asked about it.
    begun: bool,
    accepted: bool,
    concluded: bool,
}

/// The sessions of one host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Journal(BTreeMap<u64, Session>);

impl Journal {
    /// Reads the file in an agent's state directory.
    pub fn read(state_dir: &Path) -> Result<Self> {
        let path = path(state_dir);
        let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        Self::parse(&text).with_context(|| path.display().to_string())
    }

    fn parse(text: &str) -> Result<Self> {
        let mut sessions: BTreeMap<u64, Session> = BTreeMap::new();
        // A last line without its end was torn, and says nothing.
        for line in text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')) {
            let (_sum, json) = line.split_once(' ').with_context(|| format!("not a record: {line:?}"))?;
            let record: Value =
                serde_json::from_str(json).with_context(|| format!("not a record: {line:?}"))?;
            let number = record["session"].as_u64().with_context(|| format!("no session in {line:?}"))?;
            let session = sessions.entry(number).or_default();
            match record["record"].as_str() {
                Some("offered" | "waiting") => session.begun = true,
                Some("decided") => session.accepted = record["verdict"] == "accepted",
                Some("concluded") => {
                    session.concluded = true;
                    // Some say at the end again whose the VM is.
                    if let Some(verdict) = record["verdict"].as_str() {
                        session.accepted = verdict == "accepted";
                    }
                }
                // Steps in between.
                _ => {}
            }
        }
        Ok(Self(sessions))
    }

    /// Whether this host took the VM in a session that was not there `before`.
    pub fn accepted_since(&self, before: &Self) -> bool {
        let new = self.0.iter().filter(|(number, _)| !before.0.contains_key(number));
        new.into_iter().any(|(_, session)| session.accepted)
    }

    /// Sessions without an end.
    pub fn open(&self) -> Vec<u64> {
        let open = self.0.iter().filter(|(_, session)| session.begun && !session.concluded);
        open.map(|(&number, _)| number).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_are_open_taken_or_over() {
        let before = Journal::parse("1 {\"record\":\"waiting\",\"session\":1,\"vm\":\"d\"}\n").unwrap();
        let text = "1 {\"record\":\"waiting\",\"session\":1,\"vm\":\"d\"}\n\
                    2 {\"record\":\"decided\",\"session\":1,\"verdict\":\"accepted\"}\n\
                    3 {\"record\":\"offered\",\"session\":2,\"vm\":\"d\",\"peer\":\"10.0.0.1:1\"}\n\
                    4 {\"record\":\"concluded\",\"session\":2}\n\
                    5 {\"record\":\"decided\",\"session\":3,\"verdict\":\"refused\"}\n\
                    6 {\"record\":\"wai";
        let journal = Journal::parse(text).unwrap();
        assert_eq!(journal.open(), [1]);
        assert!(!journal.accepted_since(&before), "session 1 is not new");
        assert!(journal.accepted_since(&Journal::default()));
    }

    #[test]
    fn checksum_is_that_of_the_standard() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn an_acceptance_may_be_taken_back() {
        let text = "2 {\"record\":\"decided\",\"session\":1,\"verdict\":\"accepted\"}\n\
                    3 {\"record\":\"decided\",\"session\":1,\"verdict\":\"refused\"}\n";
        assert!(!Journal::parse(text).unwrap().accepted_since(&Journal::default()));
        assert!(Journal::parse("nonsense\n").is_err());
    }
}
