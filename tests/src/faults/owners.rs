//! Asks both QEMUs all the time who runs the VM, beside what their events tell.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, SystemTime};

use anyhow::Result;

use crate::lab::Side;
use crate::probe::{VmWatch, Workers};

use super::site::Site;

/// Between two looks.
const INTERVAL: Duration = Duration::from_millis(20);

/// Looks until it is dropped.
pub(super) struct Owners {
    doubled: Arc<AtomicBool>,
    _workers: Workers,
}

impl Owners {
    pub fn watch(site: &Site) -> Result<Self> {
        let doubled = Arc::new(AtomicBool::new(false));
        let mut workers = Workers::new();
        let (a, b) = (Arc::clone(site.watch(Side::A)), Arc::clone(site.watch(Side::B)));
        let seen = Arc::clone(&doubled);
        workers.start("owners", move |stop| {
            while !stop.load(Ordering::Relaxed) {
                if both_run(&a, &b) {
                    seen.store(true, Ordering::Relaxed);
                }
                thread::sleep(INTERVAL);
            }
        })?;
        Ok(Self { doubled, _workers: workers })
    }

    /// Whether both hosts ran the VM at any time.
    pub fn doubled(&self) -> bool {
        self.doubled.load(Ordering::Relaxed)
    }
}

/// They cannot be asked at the same instant: `a` must have run before and after `b` did, without a break.
fn both_run(a: &VmWatch, b: &VmWatch) -> bool {
    let runs = |watch: &VmWatch| watch.status().is_ok_and(|status| status.as_deref() == Some("running"));
    let since = SystemTime::now();
    runs(a) && runs(b) && runs(a) && a.events_since(since).is_empty()
}
