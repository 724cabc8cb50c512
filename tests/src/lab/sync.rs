//! A lock that survives a panic elsewhere: teardown must run after any failure.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks `mutex`, also when a thread that held it panicked.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
