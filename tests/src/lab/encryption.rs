//! What the agents are told about encrypting pages.

/// Whether the program under test can encrypt pages, that is, knows the key `encryption` in its configuration. Without it pages
/// are never encrypted, the key is not written, and tests of encrypted pages say so instead of running.
pub const SUPPORTED: bool = false;

/// The agent's key `encryption`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encryption {
    /// Pages are encrypted or not moved.
    Required,
    /// Encrypted if the other host can.
    Preferred,
    /// Never.
    Off,
}

impl Encryption {
    /// The key's value; `None` where it must not be written.
    pub(super) const fn value(self) -> Option<&'static str> {
        match self {
            _ if !SUPPORTED => None,
            Self::Required => Some("required"),
            Self::Preferred => Some("preferred"),
            Self::Off => Some("off"),
        }
    }
}

/// Says that a test of encrypted pages cannot run here, if so.
pub fn lacks_encryption(test: &str) -> bool {
    if !SUPPORTED {
        println!("skipped: {test}: this version does not encrypt pages");
    }
    !SUPPORTED
}
