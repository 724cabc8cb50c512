//! AF_XDP and UDP sockets at either end.

use anyhow::Result;

use crate::bench::peers::{Mover, Xferry};
use crate::bench::results::Outcome;
use crate::bench::session::Session;

/// By what frames leave host-a, and by what they arrive at host-b. The first is what the others are compared with.
const PAIRS: [Xferry; 4] = [
    Xferry { name: "AF_XDP → AF_XDP", transport: ["af-xdp", "af-xdp"], ..Xferry::DEFAULT },
    Xferry { name: "AF_XDP → UDP", transport: ["af-xdp", "udp"], ..Xferry::DEFAULT },
    Xferry { name: "UDP → AF_XDP", transport: ["udp", "af-xdp"], ..Xferry::DEFAULT },
    Xferry { name: "UDP → UDP", transport: ["udp", "udp"], ..Xferry::DEFAULT },
];

pub(super) fn run(session: &mut Session<'_>, _: &mut Outcome) -> Result<()> {
    let (network, guest) = (session.usual_network(), session.usual_guest());
    session.compare(network, &guest, &PAIRS.map(Mover::Xferry), session.args.runs())
}
