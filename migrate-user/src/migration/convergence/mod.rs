//! When to stop copying and switch over, and what to do about a guest that writes faster than the link carries.
//!
//! Pure: no clock, no VM, no link. [`Estimate`] learns from each round how fast pages go and come, [`Policy`] decides
//! what follows, [`Throttle`] is how much of the vCPUs' time is taken. The source (`migration/source/pre_copy.rs`) acts on it.

mod estimate;
mod policy;
#[cfg(test)]
mod simulation;
mod throttle;

pub use estimate::{Estimate, Prediction, RoundFigures};
pub use policy::{Convergence, Decision, Judgement, Policy, TimeoutAction};
pub use throttle::Throttle;

pub(super) use policy::on_the_way;
