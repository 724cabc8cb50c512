//! A bad wire: a relay between the migration NICs of the two hosts, which loses, repeats, reorders, corrupts and delays
//! frames as it is told.
//!
//! ```text
//!  host-a                 switch                 host-b
//!  mig0 ═══ veth ═══ mig-a ─ relay ─ mig-b ═══ veth ═══ mig0
//! ```
//!
//! The kernel need not have netem: the relay reads one port's frames from a packet socket and writes them to the
//! other's, a thread for each direction. What becomes of a frame is decided by [`Dice`] and [`Line`], which
//! know neither sockets nor clocks: the same seed gives the same fates.

pub mod bench;
mod config;
mod dice;
mod line;
mod nic;
mod relay;

pub use config::{Burst, Faults, WireConfig};
pub use dice::{Dice, Fate};
pub use line::{Frame, Line, Tally};
pub use nic::PacketNic;
pub use relay::{Counters, Wire};
