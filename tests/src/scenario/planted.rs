//! Pages of known content in a guest's RAM, put there from outside where the guest has nothing.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};

/// Bytes of a page.
const PAGE: usize = 4096;

/// Pages that hold a pattern, one after the other.
#[derive(Clone, Copy, Debug)]
pub struct Planted {
    /// Number of the first in the RAM file.
    pub first: u64,
    /// How many.
    pub pages: u64,
    /// What each holds, over and over.
    pub pattern: &'static [u8],
}

impl Planted {
    /// So many pages before the end of a guest's RAM of `mib` MiB, 1 MiB away from it: the firmware may use the very last.
    pub fn at_end(mib: u64, pages: u64, pattern: &'static [u8]) -> Self {
        let page = (1 << 20) / PAGE as u64;
        Self { first: (mib - 1) * page - pages, pages, pattern }
    }

    /// Numbers of the pages.
    pub fn numbers(&self) -> std::ops::Range<u64> {
        self.first..self.first + self.pages
    }

    fn content(&self) -> Vec<u8> {
        self.pattern.iter().copied().cycle().take(PAGE).collect()
    }

    /// Writes them into the RAM file of a guest that runs.
    ///
    /// # Errors
    /// If the guest uses one of them.
    pub fn plant(&self, ram: &Path) -> Result<()> {
        let file = OpenOptions::new().read(true).write(true).open(ram);
        let file = file.with_context(|| format!("opening {}", ram.display()))?;
        let content = self.content();
        for page in self.numbers() {
            ensure!(read(&file, page)?.iter().all(|&byte| byte == 0), "the guest uses page {page} itself");
            file.write_all_at(&content, page * PAGE as u64).context("writing guest RAM")?;
        }
        Ok(())
    }

    /// The pages of a RAM file that do not hold the pattern.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn spoiled(&self, ram: &Path) -> Result<Vec<u64>> {
        let file = File::open(ram).with_context(|| format!("opening {}", ram.display()))?;
        let content = self.content();
        let mut spoiled = Vec::new();
        for page in self.numbers() {
            if read(&file, page)? != content {
                spoiled.push(page);
            }
        }
        Ok(spoiled)
    }
}

fn read(file: &File, page: u64) -> Result<Vec<u8>> {
    let mut bytes = vec![0; PAGE];
    file.read_exact_at(&mut bytes, page * PAGE as u64).context("reading guest RAM")?;
    Ok(bytes)
}
