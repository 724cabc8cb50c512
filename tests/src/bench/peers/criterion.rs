//! What `cargo bench` found last: criterion keeps it in files.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

/// Bytes a second of a benchmark of bytes (`send/direct/9000`), by the median of its last run, GB/s; `None` when it was not
/// run.
pub(in crate::bench) fn rate(benchmark: &str) -> Option<f64> {
    directories().iter().find_map(|directory| read(&directory.join(benchmark).join("new")))
}

/// Where criterion may keep its files: in the build directory, wherever that is.
fn directories() -> Vec<PathBuf> {
    let chosen = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    chosen
        .into_iter()
        .chain([crate::lab::target_dir()])
        .map(|directory| directory.join("criterion"))
        .collect()
}

fn read(directory: &Path) -> Option<f64> {
    let json =
        |name: &str| -> Option<Value> { serde_json::from_slice(&fs::read(directory.join(name)).ok()?).ok() };
    let bytes = json("benchmark.json")?["throughput"]["Bytes"].as_f64()?;
    let nanoseconds = json("estimates.json")?["median"]["point_estimate"].as_f64()?;
    Some(bytes / nanoseconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_bytes_by_median() {
        let directory = std::env::temp_dir().join(format!("xferry-criterion-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        assert_eq!(read(&directory), None);
        fs::write(directory.join("benchmark.json"), r#"{"throughput":{"Bytes":1000}}"#).unwrap();
        let estimates = r#"{"mean":{"point_estimate":1.0},"median":{"point_estimate":500.0}}"#;
        fs::write(directory.join("estimates.json"), estimates).unwrap();
        assert_eq!(read(&directory), Some(2.0));
        // A benchmark of something else than bytes.
        fs::write(directory.join("benchmark.json"), r#"{"throughput":{"Elements":1000}}"#).unwrap();
        assert_eq!(read(&directory), None);
        fs::remove_dir_all(&directory).unwrap();
    }
}
