//! Keys and values of the BPF maps shared between the XDP program and the agent.

use crate::wire::WireError;

/// Longest interface queue list one agent serves: size of the socket map.
pub const MAX_QUEUES: u32 = 64;
/// Most migrations the data port takes at a time: size of the session map.
pub const MAX_SESSIONS: u32 = 256;

/// What a registered migration expects of its frames. The map's key is the session number.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Session {
    /// Address frames must come from; IPv4 as IPv4-mapped IPv6.
    pub peer: [u8; 16],
}

/// Per-session, per-CPU counters. The map's key is the session number.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SessionCounters {
    /// Frames handed to the session's socket.
    pub frames: u64,
    /// Their bytes, Ethernet header included.
    pub bytes: u64,
}

/// Why a frame to the data port was dropped; index into the per-CPU counter array.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum DropReason {
    /// Shorter than its own lengths say.
    Truncated = 0,
    /// Does not begin with the magic number.
    BadMagic = 1,
    /// Another protocol version.
    BadVersion = 2,
    /// A kind, reserved field or length that this version does not allow.
    Malformed = 3,
    /// No such migration.
    UnknownSession = 4,
    /// The right migration from the wrong address.
    WrongPeer = 5,
    /// No AF_XDP socket is bound to the receiving queue.
    NoSocket = 6,
    /// Behind headers that the page stream never has: IP options, extension headers, a second VLAN tag; or in
    /// fragments.
    Unsupported = 7,
}

/// Number of drop reasons: size of the counter array.
pub const DROP_REASONS: u32 = 8;

impl From<WireError> for DropReason {
    #[inline(always)]
    fn from(error: WireError) -> Self {
        match error {
            WireError::Truncated => Self::Truncated,
            WireError::BadMagic => Self::BadMagic,
            WireError::BadVersion(_) => Self::BadVersion,
            _ => Self::Malformed,
        }
    }
}

impl DropReason {
    /// Every reason, in the order of the counter array.
    pub const ALL: [Self; DROP_REASONS as usize] = [
        Self::Truncated,
        Self::BadMagic,
        Self::BadVersion,
        Self::Malformed,
        Self::UnknownSession,
        Self::WrongPeer,
        Self::NoSocket,
        Self::Unsupported,
    ];

    /// Name as shown in status and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Truncated => "truncated",
            Self::BadMagic => "bad-magic",
            Self::BadVersion => "bad-version",
            Self::Malformed => "malformed",
            Self::UnknownSession => "unknown-session",
            Self::WrongPeer => "wrong-peer",
            Self::NoSocket => "no-socket",
            Self::Unsupported => "unsupported",
        }
    }
}

// SAFETY: plain integers and byte arrays in C layout, no padding, every bit pattern valid.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Session {}
// SAFETY: as above.
#[cfg(feature = "user")]
unsafe impl aya::Pod for SessionCounters {}

#[cfg(test)]
mod tests {
    use super::DropReason;

    #[test]
    fn reasons_index_their_own_counter() {
        for (index, reason) in DropReason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, index);
        }
    }
}
