//! Settings of the kernel at the receiving NIC, by AF_XDP, and a processor for each host.

use anyhow::Result;

use crate::bench::peers::{Mover, Xferry};
use crate::bench::results::Outcome;
use crate::bench::session::Session;

/// Whether packets are taken by a thread of the kernel's, or where they come from: on veth, the sender's processor.
const THREADED: [(&str, &str); 2] = [("threaded", "0"), ("threaded", "1")];
/// How often nothing more is found before interrupts are enabled again, and for how long a timer looks meanwhile, ns.
const NEVER: [(&str, &str); 2] = [("napi_defer_hard_irqs", "0"), ("gro_flush_timeout", "0")];
const SHORT: [(&str, &str); 2] = [("napi_defer_hard_irqs", "2"), ("gro_flush_timeout", "20000")];
const LONG: [(&str, &str); 2] = [("napi_defer_hard_irqs", "2"), ("gro_flush_timeout", "200000")];

/// Each sets everything that another sets. The first is what the others are compared with.
const KNOBS: [Xferry; 5] = [
    knob("as it is", &[THREADED[0], NEVER[0], NEVER[1]]),
    knob("NAPI threaded", &[THREADED[1], NEVER[0], NEVER[1]]),
    knob("deferred 20 µs", &[THREADED[0], SHORT[0], SHORT[1]]),
    knob("deferred 200 µs", &[THREADED[0], LONG[0], LONG[1]]),
    Xferry { cpus: ["0", "1"], ..knob("a processor each", &[THREADED[0], NEVER[0], NEVER[1]]) },
];

const fn knob(name: &'static str, receiver: &'static [(&'static str, &'static str)]) -> Xferry {
    Xferry { name, transport: ["af-xdp"; 2], receiver, ..Xferry::DEFAULT }
}

pub(super) fn run(session: &mut Session<'_>, _: &mut Outcome) -> Result<()> {
    let (network, guest) = (session.usual_network(), session.usual_guest());
    session.compare(network, &guest, &KNOBS.map(Mover::Xferry), session.args.runs())
}
