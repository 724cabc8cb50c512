//! By what frames get on and off the migration NIC.

use serde::{Deserialize, Serialize};

/// By what frames get on and off the migration NIC. On the wire they are the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// AF_XDP sockets behind an XDP program.
    #[default]
    AfXdp,
    /// UDP sockets of the kernel.
    Udp,
}

impl Transport {
    /// Name as in status and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::AfXdp => "af-xdp",
            Self::Udp => "udp",
        }
    }
}
