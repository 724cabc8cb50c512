//! On which processors the threads run that move pages: the configured ones, else those of the NIC's own node where the host has
//! several, else any.

use std::{marker::PhantomData, path::Path};

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use super::AgentError;
use crate::cpus::CpuList;

/// Where threads that move pages run.
#[derive(Clone, Debug, Default)]
pub(super) struct Placement {
    /// `None`: wherever the scheduler likes.
    cpus: Option<CpuList>,
    /// Node of the NIC, where that is the reason.
    node: Option<u32>,
}

impl Placement {
    /// Settles where: on `wanted`, else near `interface`.
    ///
    /// # Errors
    /// When there are not all of `wanted`, or this process may not run on them.
    pub fn new(wanted: Option<&CpuList>, interface: &str) -> Result<Self, AgentError> {
        let refused = |problem: String| AgentError::Host(format!("[migration] cpus: {problem}"));
        let placement = Host::read(Path::new("/sys"), interface).place(wanted).map_err(refused)?;
        if let Some(wanted) = wanted {
            expect_allowed(wanted).map_err(refused)?;
        }
        Ok(placement)
    }

    /// Moves the calling thread there until the returned value is dropped. Threads that it starts meanwhile stay there
    /// (sched_setaffinity(2)) and count no other processors, and memory that it touches first is taken from there.
    #[must_use]
    pub fn enter(&self) -> Placed {
        let before = self.cpus.as_ref().and_then(|cpus| {
            let before = sched_getaffinity(None).ok()?;
            // Allowed when the agent started. Where that was changed since, any processor does.
            sched_setaffinity(None, &CpuSet::from(cpus)).ok()?;
            Some(before)
        });
        Placed { before, of_this_thread: PhantomData }
    }

    /// In a few words; nothing where threads run anywhere.
    pub fn describe(&self) -> Option<String> {
        let cpus = self.cpus.as_ref()?;
        Some(match self.node {
            Some(node) => format!("{cpus} (node {node}, the NIC's)"),
            None => cpus.to_string(),
        })
    }
}

/// A thread that runs where pages are moved; gives it back its processors when dropped.
pub(super) struct Placed {
    before: Option<CpuSet>,
    /// Affinity is a thread's.
    of_this_thread: PhantomData<*const ()>,
}

impl Drop for Placed {
    fn drop(&mut self) {
        if let Some(before) = self.before.take() {
            // It ran there before.
            let _ = sched_setaffinity(None, &before);
        }
    }
}

/// A process's control group may have fewer processors than the host (cgroup v2 `cpuset.cpus`, systemd `AllowedCPUs=`), and then
/// the kernel leaves out the others without a word.
fn expect_allowed(wanted: &CpuList) -> Result<(), String> {
    let advice = "give others, or change AllowedCPUs= of the agent's unit";
    let before = sched_getaffinity(None).map_err(|error| format!("this thread's processors: {error}"))?;
    let set = CpuSet::from(wanted);
    sched_setaffinity(None, &set)
        .map_err(|error| format!("the agent may not run on {wanted} ({error}): {advice}"))?;
    let had = sched_getaffinity(None);
    // It ran there before.
    let _ = sched_setaffinity(None, &before);
    match had {
        Ok(had) if had == set => Ok(()),
        _ => Err(format!("the agent may not run on all of {wanted}: {advice}")),
    }
}

/// What of this host matters.
struct Host {
    online: Option<CpuList>,
    /// Nodes with processors or memory; one where there is no NUMA.
    nodes: usize,
    /// The NIC's node and its processors; `None` for a NIC that is on none, as all that are not hardware.
    near: Option<(u32, CpuList)>,
}

impl Host {
    /// Reads sysfs, which is mounted at `sys`.
    fn read(sys: &Path, interface: &str) -> Self {
        let text = |path: String| std::fs::read_to_string(sys.join(path)).ok();
        let list = |path: String| text(path)?.parse::<CpuList>().ok();
        let node = text(format!("class/net/{interface}/device/numa_node"));
        // -1 where firmware does not say.
        let node: Option<u32> = node.and_then(|node| node.trim().parse().ok());
        Self {
            online: list("devices/system/cpu/online".into()),
            // Nodes are listed as processors are.
            nodes: list("devices/system/node/online".into()).map_or(1, |nodes| nodes.count()),
            near: node
                .and_then(|node| Some((node, list(format!("devices/system/node/node{node}/cpulist"))?))),
        }
    }

    fn place(self, wanted: Option<&CpuList>) -> Result<Placement, String> {
        let Some(wanted) = wanted else {
            let near = self.near.filter(|_| self.nodes > 1);
            return Ok(match near {
                Some((node, cpus)) => Placement { cpus: Some(cpus), node: Some(node) },
                None => Placement::default(),
            });
        };
        if let Some(online) = &self.online
            && let Some(missing) = wanted.without(online)
        {
            return Err(format!(
                "there is no processor {missing}, or it is offline: this host has {online} online"
            ));
        }
        Ok(Placement { cpus: Some(wanted.clone()), node: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(text: &str) -> CpuList {
        text.parse().unwrap()
    }

    /// A host of two nodes, with `nic` on the second, `old` on one that firmware does not tell, and `veth`.
    fn sysfs() -> tempfile::TempDir {
        let sys = tempfile::tempdir().unwrap();
        for (path, content) in [
            ("devices/system/cpu/online", "0-7\n"),
            ("devices/system/node/online", "0-1\n"),
            ("devices/system/node/node1/cpulist", "4-7\n"),
            ("class/net/nic/device/numa_node", "1\n"),
            ("class/net/old/device/numa_node", "-1\n"),
            ("class/net/veth/mtu", "1500\n"),
        ] {
            let path = sys.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }
        sys
    }

    #[test]
    fn near_the_nic_where_there_is_more_than_one_node() {
        let sys = sysfs();
        let near = |nic: &str| Host::read(sys.path(), nic).place(None).unwrap().describe();
        assert_eq!(near("nic").as_deref(), Some("4-7 (node 1, the NIC's)"));
        assert_eq!((near("old"), near("veth")), (None, None));
        std::fs::write(sys.path().join("devices/system/node/online"), "0\n").unwrap();
        assert_eq!(near("nic"), None, "one node: every processor is near");
    }

    #[test]
    fn on_those_that_are_named() {
        let sys = sysfs();
        let on = |cpus: &str| Host::read(sys.path(), "nic").place(Some(&list(cpus)));
        assert_eq!(on("0,2-3").unwrap().describe().as_deref(), Some("0,2-3"));
        let error = on("6-9,12").unwrap_err();
        assert!(error.contains("no processor 8-9,12") && error.contains("0-7 online"), "{error}");
    }

    #[test]
    fn threads_are_moved_and_brought_back() {
        let set = || sched_getaffinity(None).unwrap();
        let before = set();
        let first = (0..CpuSet::MAX_CPU).find(|&cpu| before.is_set(cpu)).unwrap();
        let placement = Placement { cpus: Some(list(&first.to_string())), node: None };
        {
            let _placed = placement.enter();
            assert_eq!((set().count(), set().is_set(first)), (1, true));
            let inherited = std::thread::spawn(move || sched_getaffinity(None).unwrap());
            assert_eq!(inherited.join().unwrap().count(), 1, "threads started meanwhile stay there");
        }
        assert_eq!(set(), before);
        let _anywhere = Placement::default().enter();
        assert_eq!(set(), before);
        assert!(expect_allowed(&list(&first.to_string())).is_ok());
        assert_eq!(set(), before);
    }
}
