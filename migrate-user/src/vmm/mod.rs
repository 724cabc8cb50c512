//! Virtual machine monitors: what a migration needs of one ([`SourceVm`], [`DestinationVm`]), and QEMU.

mod definition;
mod destination;
mod inspect;
mod qmp;
mod source;
mod throttle;

#[cfg(any(test, fuzzing))]
pub(crate) use qmp::fuzz as fuzz_qmp;

pub use definition::{DefinitionError, NicDefinition, VmDefinition};
pub use destination::QemuDestination;
pub use inspect::{CpuFacts, Disk, FeatureWord, MachineFacts, VmFacts, VmNic, inspect};
pub use qmp::{Event, Qmp, QmpError};
pub use source::QemuSource;
pub use throttle::{GUARD_ARGUMENT, ThrottleError, guard};

use std::{
    future::Future,
    time::{Duration, Instant},
};

use bytes::Bytes;

use crate::memory::MemoryError;

/// What went wrong with a VMM.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// The monitor.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// Its memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Its vCPUs.
    #[error("the vCPUs cannot be throttled: {0}")]
    Throttle(#[from] ThrottleError),
    /// The VM cannot be migrated as it is.
    #[error("VM {vm} cannot be migrated: {reason}")]
    Unfit {
        /// The VM.
        vm: String,
        /// Why, and what to do.
        reason: String,
    },
    /// The destination's VMM cannot be started or used.
    #[error("VM {vm} cannot be received here: {reason}")]
    Launch {
        /// The VM.
        vm: String,
        /// Why, and what to do.
        reason: String,
    },
    /// QEMU's own migration of the device state failed.
    #[error("QEMU's device state: {0}")]
    State(String),
    /// Nothing happened in time.
    #[error("QEMU did not get to {waited_for} within {seconds} s")]
    Timeout {
        /// What was waited for.
        waited_for: &'static str,
        /// The limit.
        seconds: u64,
    },
    /// The device state's pipe failed.
    #[error("the pipe to QEMU broke: {0}")]
    Pipe(#[from] std::io::Error),
}

/// A running VM that is to leave.
///
/// Guarantee: until [`quit`](Self::quit), [`resume`](Self::resume) makes it run again from whatever step was reached.
pub trait SourceVm: Send {
    /// Pauses vCPUs and drains I/O for a quiesced scan.
    fn pause(&mut self) -> impl Future<Output = Result<(), VmmError>> + Send;
    /// Ends [`pause`](Self::pause).
    fn unpause(&mut self) -> impl Future<Output = Result<(), VmmError>> + Send;
    /// Takes `percent` (0 to 99) of its time from each vCPU, until told otherwise or until this agent ends, however it does. 0
    /// lifts the limit at once, and leaves what is needed for another. Returns by what it is done.
    fn throttle(&mut self, percent: u8) -> impl Future<Output = Result<&'static str, VmmError>> + Send;
    /// Gives all of it back, also what an earlier life of this agent took, and leaves nothing. Safe to call at any time.
    fn unthrottle(&mut self) -> impl Future<Output = Result<(), VmmError>> + Send;
    /// Stops the VM for good, with its I/O drained, and holds the device state back. Returns the instant at which
    /// the vCPUs stopped.
    fn stop(&mut self) -> impl Future<Output = Result<Instant, VmmError>> + Send;
    /// Lets the device state flow: no page changes after [`stop`](Self::stop), so the pages must have left before.
    fn release_state(&mut self) -> impl Future<Output = Result<(), VmmError>> + Send;
    /// The next part of the device state; `None` at its end.
    fn state(&mut self) -> impl Future<Output = Result<Option<Bytes>, VmmError>> + Send;
    /// Makes the VM run again as if nothing had been tried. Safe to call at any time, more than once.
    fn resume(&mut self) -> impl Future<Output = Result<(), VmmError>> + Send;
    /// Ends the VMM: the VM lives elsewhere now.
    fn quit(&mut self) -> impl Future<Output = Result<(), VmmError>> + Send;
}

/// A VM that waits for its state.
///
/// Guarantee: it runs no instruction before [`run`](Self::run), and nothing of it is left after
/// [`destroy`](Self::destroy).
pub trait DestinationVm: Send {
    /// Takes the next part of the device state.
    fn load(&mut self, state: Bytes) -> impl Future<Output = Result<(), VmmError>> + Send;
    /// All of the state was given: waits until it is loaded. The VM is still stopped.
    fn finish(&mut self) -> impl Future<Output = Result<(), VmmError>> + Send;
    /// Starts the vCPUs; returns when they run.
    fn run(&mut self) -> impl Future<Output = Result<(), VmmError>> + Send;
    /// Waits until the VMM has ended by itself, and says why as far as that can be known.
    fn ended(&mut self) -> impl Future<Output = VmmError> + Send;
    /// Ends the VM. `None` when it is not certain that it is gone.
    fn destroy(&mut self) -> impl Future<Output = Option<Destroyed>> + Send;
}

/// How long a VMM may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmmLimits {
    /// An answer of its monitor.
    pub answer: Duration,
    /// Its start, until its monitor answers.
    pub start: Duration,
    /// Each step of its own migration.
    pub step: Duration,
    /// Its end when told to.
    pub quit: Duration,
}

/// What became of a VM that was ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Destroyed {
    /// No vCPU of it ever ran.
    NeverRan,
    /// It may have run for a moment, and may have written to its disks.
    MayHaveRun,
}
