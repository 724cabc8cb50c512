//! What the agents are told about encrypting pages.

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
    /// The key's value.
    pub(super) const fn value(self) -> &'static str {
        match self {
            Self::Required => "required",
            Self::Preferred => "preferred",
            Self::Off => "off",
        }
    }
}
