//! The guest's RAM as QEMU made it.

use serde_json::json;

use super::{Qmp, QmpError, child, human, items, qom_get, qom_list, text};
use crate::memory::{Backend, MemoryError, RamFile, find_ram_files};

/// RAM, as it was found.
pub(super) struct Memory {
    pub backends: Vec<Backend>,
    pub files: Result<Vec<RamFile>, MemoryError>,
    pub reserved: bool,
    pub numa: Vec<String>,
}

pub(super) async fn ask(qmp: &Qmp) -> Result<Memory, QmpError> {
    let kinds = qom_list(qmp, "/objects").await?;
    let list = qmp.execute("query-memdev", json!({})).await?;
    let not_shared = |id: &str, found: String| MemoryError::NotShared {
        backend: if id.is_empty() { "ram".into() } else { id.to_owned() },
        pid: qmp.pid(),
        found,
    };
    let mut ram = Vec::new();
    let mut unmovable = None;
    let mut reserved = true;
    for memdev in items(&list) {
        let id = text(&memdev["id"]);
        let size = memdev["size"].as_u64().unwrap_or(0);
        reserved &= memdev["reserve"] != false;
        let kind = kinds.iter().find(|(name, _)| *name == id).and_then(|(_, kind)| child(kind));
        let mut path = String::new();
        match kind.unwrap_or("unknown") {
            "memory-backend-file" => path = text(&qom_get(qmp, &format!("/objects/{id}"), "mem-path").await?),
            other => unmovable = Some(not_shared(&id, format!("a {other}, not a memory-backend-file"))),
        }
        ram.push((id, path, size));
    }
    if ram.is_empty() {
        unmovable = Some(not_shared("", "not made of memory backends".into()));
    }
    // Both hosts must come to the same order.
    ram.sort();
    let files = match unmovable {
        Some(error) => Err(error),
        None => find_ram_files(qmp.pid(), &ram),
    };
    Ok(Memory {
        backends: ram.into_iter().map(|(id, _, size)| Backend { id, size }).collect(),
        files,
        reserved,
        numa: numa_nodes(&human(qmp, "info numa").await?),
    })
}

/// The lines about nodes in the answer to "info numa". Which CPUs and how much memory a node has is in tables
/// that the guest has read long ago.
fn numa_nodes(prose: &str) -> Vec<String> {
    prose.lines().map(str::trim).filter(|line| line.starts_with("node ")).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numa_is_read_from_qemus_prose() {
        let prose = "2 nodes\r\nnode 0 cpus: 0 1\r\nnode 0 size: 128 MB\r\nnode 0 plugged: 0 MB\r\nnode 1 cpus:\r\nnode 1 size: 128 MB\r\n";
        assert_eq!(numa_nodes(prose).len(), 5);
        assert_eq!(numa_nodes(prose)[1], "node 0 size: 128 MB");
        assert!(numa_nodes("0 nodes\r\n").is_empty());
    }
}
