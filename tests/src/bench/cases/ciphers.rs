//! What encryption costs whole migrations, by cipher. What it costs one core in memory says
//! `cargo bench -p migrate-user --bench protection`.

use anyhow::Result;

use crate::bench::peers::{Mover, Xferry};
use crate::bench::results::Outcome;
use crate::bench::session::Session;

/// The first is what the others are compared with.
const GUARDS: [Xferry; 4] = [
    Xferry { name: "CRC32C (off)", settings: "encryption = \"off\"", ..Xferry::DEFAULT },
    Xferry { name: "aes-128-gcm", settings: "ciphers = [\"aes-128-gcm\"]", ..Xferry::DEFAULT },
    Xferry { name: "aes-256-gcm", settings: "ciphers = [\"aes-256-gcm\"]", ..Xferry::DEFAULT },
    Xferry { name: "chacha20-poly1305", settings: "ciphers = [\"chacha20-poly1305\"]", ..Xferry::DEFAULT },
];

pub(super) fn run(session: &mut Session<'_>, _: &mut Outcome) -> Result<()> {
    let (network, guest) = (session.usual_network(), session.usual_guest());
    session.compare(network, &guest, &GUARDS.map(Mover::Xferry), session.args.runs())
}
