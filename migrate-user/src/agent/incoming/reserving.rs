//! Memory for a VM that comes, taken beside the first round.

use std::{sync::Arc, thread::JoinHandle};

use crate::{cpus, datapath::Inbound, migration::MigrationError};

/// Threads that take memory ahead of the first round, at most.
const MAX_RESERVERS: usize = 8;

/// How many threads take memory ahead of `workers` that receive, on a host of so many processors: half of those that do not
/// receive, rounded down. Where none is idle, first touch costs least as pages are written
/// ([`Reservation`](crate::memory::Reservation)).
fn reservers(processors: usize, workers: usize, must: bool) -> usize {
    (processors.saturating_sub(workers) / 2).clamp(usize::from(must), MAX_RESERVERS)
}

/// Takes the memory of `chunks` beside the first round, by several threads by turns.
pub(super) fn start(
    inbound: &Arc<Inbound>,
    chunks: &[(u64, u64)],
    workers: usize,
) -> Result<Vec<JoinHandle<()>>, MigrationError> {
    let threads = reservers(cpus::usable(), workers, inbound.must_reserve());
    let start = |number: usize| {
        let inbound = Arc::clone(inbound);
        let chunks = chunks.to_vec();
        std::thread::Builder::new().name(format!("reserve-{number}")).spawn(move || {
            let all = chunks.into_iter().flat_map(|(start, end)| start..end);
            inbound.reserve(all.skip(number).step_by(threads));
        })
    };
    let started = (0..threads).map(start).collect::<std::io::Result<_>>();
    started.map_err(|error| MigrationError::Host(format!("no thread to reserve memory: {error}")))
}

#[cfg(test)]
mod tests {
    use super::reservers;

    #[test]
    fn only_idle_processors_take_memory_ahead() {
        let with = |processors| reservers(processors, 1, false);
        assert_eq!([1, 2, 3, 4, 8, 16, 128].map(with), [0, 0, 1, 1, 3, 7, 8]);
        assert_eq!(reservers(8, 8, false), 0);
        assert_eq!(reservers(2, 2, true), 1, "huge pages are always covered");
    }
}
