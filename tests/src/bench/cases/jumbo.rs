//! The largest frames that a veth takes.

use anyhow::Result;

use super::{ours, random};
use crate::bench::results::Outcome;
use crate::bench::session::{Network, Session};

/// As much as IPv4's length field can say.
const MTU: u32 = 65535;

pub(super) fn run(session: &mut Session<'_>, outcome: &mut Outcome) -> Result<()> {
    let network = Network { mtu: MTU, shape: None };
    let guest = session.usual_guest();
    session.compare(network, &guest, &[ours()], session.args.runs())?;
    random::link(session, outcome, network, 1.7)
}
