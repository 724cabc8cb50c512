//! VMs on their way to this host, and the memory that they were promised.

use std::{
    fs::File,
    os::unix::fs::MetadataExt,
    sync::{Mutex, MutexGuard},
};

use super::AdmissionConfig;
use crate::preflight::Admission;
use crate::sync::lock;

/// Unit of `st_blocks` (stat(2)), bytes.
const BLOCK: u64 = 512;

/// All of them, in the order in which they came.
#[derive(Default)]
pub(super) struct Arrivals(Mutex<Vec<Arrival>>);

struct Arrival {
    vm: String,
    /// A check takes no memory to keep and is over in a moment: it is in nobody's way.
    check: bool,
    /// Bytes that the VM needs.
    needed: u64,
    /// Where it gets them, once that is known.
    files: Vec<File>,
}

impl Arrival {
    /// Bytes that it will still take.
    fn promised(&self) -> u64 {
        if self.check {
            return 0;
        }
        let blocks = |file: &File| file.metadata().map_or(0, |metadata| metadata.blocks());
        self.needed.saturating_sub(self.files.iter().map(blocks).sum::<u64>() * BLOCK)
    }
}

impl Arrivals {
    fn list(&self) -> MutexGuard<'_, Vec<Arrival>> {
        lock(&self.0)
    }

    /// Names of the VMs.
    pub fn names(&self) -> Vec<String> {
        self.list().iter().map(|arrival| arrival.vm.clone()).collect()
    }

    /// Lists a VM, unless it is listed already, and says how it stands with those that came before. The caller
    /// [`leave`](Self::leave)s when it was not the `same`.
    pub fn enter(&self, vm: &str, check: bool, needed: u64, rules: AdmissionConfig) -> Admission {
        let mut list = self.list();
        let same = list.iter().any(|other| other.vm == vm);
        let before = list.iter().filter(|other| !other.check && other.vm != vm);
        let admission = Admission {
            max_arriving: rules.max_arriving,
            arriving: before.clone().map(|other| other.vm.clone()).collect(),
            same,
            headroom: rules.memory_headroom_mib << 20,
            promised: before.map(Arrival::promised).sum(),
        };
        if !same {
            list.push(Arrival { vm: vm.to_owned(), check, needed, files: Vec::new() });
        }
        admission
    }

    /// The VM takes its memory from `files` from now on.
    pub fn takes_from(&self, vm: &str, files: Vec<File>) {
        if let Some(arrival) = self.list().iter_mut().find(|other| other.vm == vm) {
            arrival.files = files;
        }
    }

    /// The VM is here, or does not come.
    pub fn leave(&self, vm: &str) {
        self.list().retain(|other| other.vm != vm);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: AdmissionConfig = AdmissionConfig { max_arriving: Some(2), memory_headroom_mib: 1 };

    #[test]
    fn those_before_count_and_checks_do_not() {
        let arrivals = Arrivals::default();
        assert_eq!(arrivals.enter("a", false, 100 << 20, RULES).arriving, [""; 0]);
        assert!(arrivals.enter("c", true, 100 << 20, RULES).promised > 0);
        let third = arrivals.enter("b", false, 1 << 20, RULES);
        assert_eq!((third.arriving, third.same, third.promised), (vec!["a".to_owned()], false, 100 << 20));
        assert!(arrivals.enter("b", false, 0, RULES).same);
        arrivals.leave("a");
        assert_eq!(arrivals.names(), ["c", "b"]);
    }

    #[test]
    fn what_is_taken_is_no_longer_promised() {
        let arrivals = Arrivals::default();
        arrivals.enter("a", false, 8192, RULES);
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        arrivals.takes_from("a", vec![file.try_clone().unwrap()]);
        assert_eq!(arrivals.enter("b", false, 0, RULES).promised, 8192);
        std::os::unix::fs::FileExt::write_all_at(&file, &[1; 4096], 0).unwrap();
        arrivals.leave("b");
        assert_eq!(arrivals.enter("b", false, 0, RULES).promised, 4096);
    }
}
