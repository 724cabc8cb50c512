//! Plots of what was measured.

mod chart;
mod data;

use std::path::Path;

use anyhow::Result;

use super::results::Results;

/// Draws what there are figures for: `rounds.svg`, `blackout.svg`, `sizes.svg`.
pub(super) fn draw(results: &Results, directory: &Path) -> Result<()> {
    let plots = [
        ("rounds.svg", data::rounds(results)),
        ("blackout.svg", data::blackout(results)),
        ("sizes.svg", data::sizes(results)),
    ];
    for (name, plot) in plots {
        if plot.lines.is_empty() {
            continue;
        }
        let path = directory.join(name);
        chart::draw(&plot, &path)?;
        println!("plot: {}", path.display());
    }
    Ok(())
}
