//! Taking time away from a VM's vCPUs, from outside, and giving it back whatever happens.
//!
//! Each vCPU thread is put into a cgroup of its own below the one that it is in, and that one gets a bandwidth limit
//! (`cpu.max`; with cgroups of version 1 `cpu.cfs_quota_us`). QEMU notices nothing and is asked nothing but the threads'
//! numbers; its other threads, and so disks and network, keep all their time.
//!
//! A limit stays when its maker dies. So there are three who lift it: the agent, by [`VcpuThrottle::release`] and on drop; a
//! guard process ([`guard`]), the moment the agent is gone; and an agent that is started anew ([`release_leftovers`]), should both have
//! been killed. QMP `stop` and `cont` in turns would need none of it to be taken away and all of it to be given back: a VM whose
//! agent dies would stay stopped; nor has QEMU a throttle of its own outside its own migration of RAM.

mod cgroup;
mod guard;

pub use guard::{GUARD_ARGUMENT, guard};

use cgroup::{Group, Hierarchy};
use guard::Guard;

/// Why vCPUs are not throttled.
#[derive(Debug, thiserror::Error)]
pub enum ThrottleError {
    /// No controller to do it with.
    #[error("no cgroup of its QEMU can limit CPU time: {0}")]
    NoController(String),
    /// A controller that does not do it.
    #[error("{step} {path}: {source}")]
    Cgroup {
        /// What was tried.
        step: &'static str,
        /// With what.
        path: String,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// Nobody would lift it if this agent died.
    #[error("the process that lifts it should the agent die does not start: {0}")]
    Guard(std::io::Error),
}

/// A VM whose vCPUs are throttled. Gives all back when dropped.
#[derive(Debug)]
pub struct VcpuThrottle {
    groups: Vec<Group>,
    guard: Guard,
}

impl VcpuThrottle {
    /// Makes ready for the vCPU threads `threads` of process `pid`; nothing is taken from them yet.
    ///
    /// # Errors
    /// [`ThrottleError`]; nothing of it is left then.
    pub fn new(pid: u32, threads: &[u32]) -> Result<Self, ThrottleError> {
        let hierarchy = Hierarchy::of(pid, threads)?;
        let groups: Vec<Group> =
            threads.iter().map(|&thread| hierarchy.group(pid, thread)).collect::<Result<_, _>>()?;
        // Before there is anything to lift.
        let guard = Guard::start(&groups)?;
        let this = Self { groups, guard };
        // What was made is taken back by the drop if one fails.
        this.groups.iter().try_for_each(Group::enter)?;
        Ok(this)
    }

    /// Takes `percent` of each vCPU's time, 0 to 99.
    ///
    /// # Errors
    /// [`ThrottleError`].
    pub fn set(&mut self, percent: u8) -> Result<(), ThrottleError> {
        self.guard.keep(&self.groups)?;
        self.groups.iter().try_for_each(|group| group.limit(percent))
    }

    /// By what, in the kernel's words.
    pub fn mechanism(&self) -> &'static str {
        self.groups.first().map_or("none", Group::mechanism)
    }

    /// Gives all back.
    ///
    /// # Errors
    /// What the kernel says; the guard tries again.
    pub fn release(mut self) -> Result<(), ThrottleError> {
        self.lift()
    }

    fn lift(&mut self) -> Result<(), ThrottleError> {
        // Each of them, whatever becomes of the others.
        let results: Vec<_> = std::mem::take(&mut self.groups).iter().map(Group::remove).collect();
        results.into_iter().collect()
    }
}

impl Drop for VcpuThrottle {
    fn drop(&mut self) {
        if let Err(error) = self.lift() {
            tracing::warn!(%error, "a throttle is not lifted yet");
        }
    }
}

/// Lifts what an earlier life of the agent has left on the vCPU threads `threads` of process `pid`. Whether there was
/// anything.
///
/// # Errors
/// What the kernel says.
pub fn release_leftovers(pid: u32, threads: &[u32]) -> Result<bool, ThrottleError> {
    let found = cgroup::leftovers(pid, threads);
    found.iter().try_for_each(Group::remove)?;
    Ok(!found.is_empty())
}
