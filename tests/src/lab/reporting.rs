//! Free memory of a virtual machine, which its kernel tells the machine below to take away (free page reporting) and which then is
//! missing for milliseconds whenever it is touched: not for as long as a lab lives that says so.

use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::layout::Layout;

/// The order of the smallest free block that is reported (`mm/page_reporting.c`); not there on a machine that reports none.
const ORDER: &str = "/sys/module/page_reporting/parameters/page_reporting_order";
/// Above the largest block that there is; where the kernel does not take that, the largest (`MAX_PAGE_ORDER`).
const NEVER: [&str; 2] = ["11", "10"];

/// Ends reporting until the lab is removed. `false` where there is none.
pub(super) fn stop(layout: &Layout) -> Result<bool> {
    let before = match fs::read_to_string(ORDER) {
        Ok(order) => order,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error).with_context(|| format!("reading {ORDER}")),
    };
    // Before it is changed: whoever removes the lab has to know, also when we are killed between the two.
    let note = note(layout);
    fs::write(&note, before).with_context(|| format!("writing {}", note.display()))?;
    let set = |order: &str| fs::write(ORDER, order);
    NEVER.into_iter().map(set).find(Result::is_ok).with_context(|| format!("no {NEVER:?} for {ORDER}"))??;
    Ok(true)
}

/// Reports as before. Nothing to do for a lab that did not stop it.
pub(super) fn resume(layout: &Layout) -> Result<()> {
    let note = note(layout);
    let before = match fs::read_to_string(&note) {
        Ok(order) => order,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(|| format!("reading {}", note.display())),
    };
    fs::write(ORDER, before.trim()).with_context(|| format!("writing {ORDER}"))?;
    fs::remove_file(&note).with_context(|| format!("removing {}", note.display()))
}

fn note(layout: &Layout) -> PathBuf {
    layout.run_dir().join("page-reporting-order")
}
