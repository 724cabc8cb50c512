//! Memory for a VM that comes, taken beside the first round.

use std::{sync::Arc, thread::JoinHandle};

use crate::{datapath::Inbound, memory::Ahead, migration::MigrationError};

/// Threads that take memory ahead of the first round, at most.
const MAX_RESERVERS: usize = 8;

/// How many threads take memory ahead of `workers` that receive, on a host of so many processors, and how far: half of the
/// processors that do not receive. Where there is none, first touch costs least as pages are written
/// ([`Reservation`](crate::memory::Reservation)).
///
/// Writing to a file and allocating it take turns (`inode_lock` in `shmem_file_write_iter` and `shmem_fallocate`, mm/shmem.c), and
/// would keep several workers from each other: for them memory is mapped ahead, as it is where processors are idle.
fn plan(processors: usize, workers: usize, must: bool) -> (usize, Ahead) {
    let spare = processors.saturating_sub(workers);
    let mapped = workers > 1 || spare > 2;
    let least = usize::from(must || workers > 1);
    (spare.div_ceil(2).clamp(least, MAX_RESERVERS), if mapped { Ahead::Mapped } else { Ahead::Allocated })
}

/// Takes the memory of `chunks` beside the first round, by several threads by turns.
pub(super) fn start(
    inbound: &Arc<Inbound>,
    chunks: &[(u64, u64)],
    workers: usize,
) -> Result<Vec<JoinHandle<()>>, MigrationError> {
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let (threads, ahead) = plan(processors, workers, inbound.must_reserve());
    let start = |number: usize| {
        let inbound = Arc::clone(inbound);
        let chunks = chunks.to_vec();
        std::thread::Builder::new().name(format!("reserve-{number}")).spawn(move || {
            let all = chunks.into_iter().flat_map(|(start, end)| start..end);
            inbound.reserve(all.skip(number).step_by(threads), ahead);
        })
    };
    let started = (0..threads).map(start).collect::<std::io::Result<_>>();
    started.map_err(|error| MigrationError::Host(format!("no thread to reserve memory: {error}")))
}

#[cfg(test)]
mod tests {
    use super::{Ahead, plan};

    #[test]
    fn only_spare_processors_take_memory_ahead() {
        let with = |processors| plan(processors, 1, false).0;
        assert_eq!([1, 2, 3, 4, 8, 16, 128].map(with), [0, 1, 1, 2, 4, 8, 8]);
        assert_eq!(plan(1, 1, true).0, 1, "huge pages are always covered");
    }

    #[test]
    fn memory_is_mapped_where_processors_are_idle_or_workers_would_wait_for_each_other() {
        assert_eq!([1, 2, 3, 4, 16].map(|processors| plan(processors, 1, false).1), {
            use Ahead::{Allocated, Mapped};
            [Allocated, Allocated, Allocated, Mapped, Mapped]
        });
        assert_eq!(plan(2, 2, false), (1, Ahead::Mapped));
    }
}
