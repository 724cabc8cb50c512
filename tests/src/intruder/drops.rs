//! What became of the intruder's frames: counted by an agent, or lost before its NIC.

use std::collections::BTreeMap;

use anyhow::{Context, Result};

use crate::lab::Lab;
use crate::lab::plan::Side;
use crate::scenario::{link, status};

/// A host's counters at a moment.
#[derive(Clone, Debug)]
pub struct Drops {
    /// Frames to the data port that the bouncer dropped, by reason.
    by_reason: BTreeMap<String, u64>,
    /// Frames that the switch could not give to the host's NIC: a full queue, as on any wire.
    lost: u64,
}

impl Drops {
    /// Reads the counters of `side`'s agent and of the switch's port to it.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn read(lab: &Lab, side: Side) -> Result<Self> {
        // First the loss: what is lost later than that is not taken for dropped.
        let port = link(&lab.layout().switch(), side.migration_port())?;
        let lost =
            port["stats64"]["tx"]["dropped"].as_u64().with_context(|| format!("no counters in {port}"))?;
        let status = status(lab.host(side))?;
        let list = status["port"]["drops"].as_array().with_context(|| format!("no drops in {status}"))?;
        let read =
            |drop: &serde_json::Value| Some((drop["reason"].as_str()?.to_owned(), drop["frames"].as_u64()?));
        let by_reason = list.iter().map(read).collect::<Option<_>>().context("a drop without a reason")?;
        Ok(Self { by_reason, lost })
    }

    /// Frames dropped for `reason`.
    pub fn of(&self, reason: &str) -> u64 {
        self.by_reason.get(reason).copied().unwrap_or(0)
    }

    /// The reasons for which more frames were dropped since `before`, with how many.
    pub fn since(&self, before: &Self) -> BTreeMap<String, u64> {
        let grown = |(reason, &count): (&String, &u64)| {
            let more = count - before.of(reason);
            (more > 0).then(|| (reason.clone(), more))
        };
        self.by_reason.iter().filter_map(grown).collect()
    }

    /// Frames lost before the NIC since `before`, whoever's they were.
    pub fn lost_since(&self, before: &Self) -> u64 {
        self.lost - before.lost
    }
}
