//! Kernel modules and what they need.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Finds modules and all that they need, each after what it needs.
///
/// The package has no list of that (it is made when it is installed), but each module names what it needs.
pub(super) fn in_load_order(tree: &Path, wanted: &[&str]) -> Result<Vec<PathBuf>> {
    let mut available = HashMap::new();
    find(tree, &mut available)?;
    let mut order = Vec::new();
    for name in wanted {
        add(name, &available, &mut order)?;
    }
    Ok(order)
}

fn add(name: &str, available: &HashMap<String, PathBuf>, order: &mut Vec<PathBuf>) -> Result<()> {
    let path = available
        .get(name)
        .with_context(|| format!("the kernel has no uncompressed module {name}; its packages changed"))?;
    if order.contains(path) {
        return Ok(());
    }
    let module = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    for needed in needs(&module) {
        add(&needed, available, order)?;
    }
    order.push(path.clone());
    Ok(())
}

/// The modules below a directory by the names they have in the kernel.
fn find(dir: &Path, modules: &mut HashMap<String, PathBuf>) -> Result<()> {
    let what = || format!("looking for modules in {}", dir.display());
    for entry in fs::read_dir(dir).with_context(what)? {
        let entry = entry.with_context(what)?;
        let path = entry.path();
        // A link to elsewhere is no part of the package.
        if entry.file_type().with_context(what)?.is_dir() {
            find(&path, modules)?;
        } else if let Some(name) = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".ko")) {
            modules.insert(name.replace('-', "_"), path);
        }
    }
    Ok(())
}

/// The value of `depends` in a module's information: texts that end with a zero byte, one after the other.
fn needs(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(start) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = module[start + KEY.len()..].split(|&byte| byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(value)
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn what_is_needed_comes_first() {
        let dir = std::env::temp_dir().join(format!("xferry-modules-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(dir.join("kernel/net")).unwrap();
        let write = |path: &str, needs: &str| {
            fs::write(dir.join(path), format!("ELF\0license=GPL\0depends={needs}\0name=x\0")).unwrap();
        };
        write("kernel/virtio.ko", "virtio-ring");
        write("kernel/virtio-ring.ko", "");
        write("kernel/net/virtio_net.ko", "virtio_ring,virtio");
        let order = in_load_order(&dir, &["virtio_net", "virtio"]).unwrap();
        let names: Vec<_> = order.iter().map(|path| path.file_name().unwrap().to_str().unwrap()).collect();
        assert_eq!(names, ["virtio-ring.ko", "virtio.ko", "virtio_net.ko"]);
        assert!(in_load_order(&dir, &["igb"]).is_err());
        fs::remove_dir_all(&dir).unwrap();
    }
}
