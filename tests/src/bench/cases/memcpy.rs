//! The bound of everything that touches each byte once.

use anyhow::Result;

use crate::bench::peers::memcpy;
use crate::bench::results::Outcome;
use crate::bench::session::Session;

pub(super) fn run(_: &mut Session<'_>, outcome: &mut Outcome) -> Result<()> {
    outcome.rates = memcpy::measure()?;
    Ok(())
}
