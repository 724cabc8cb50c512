//! What the PVH loader tells: command line and memory map.

unsafe extern "C" {
    static start_info_address: u64;
}

/// Longest command line that is looked at.
const COMMAND_LINE_MAX: usize = 2048;
const MAGIC: u32 = 0x336e_c578;
const RAM: u32 = 1;

#[repr(C)]
struct RawStartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    modules: u32,
    module_list: u64,
    command_line: u64,
    rsdp: u64,
    memory_map: u64,
    memory_map_entries: u32,
    reserved: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RawMapEntry {
    address: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

/// The loader's information; it lies below the image and is never overwritten by the workload.
pub struct StartInfo {
    raw: &'static RawStartInfo,
}

impl StartInfo {
    /// Takes the address that the boot code saved.
    pub fn from_boot() -> Self {
        // SAFETY: the boot code stored the pointer it was started with; the PVH protocol says it points
        // to this structure, below 4 GiB, and the loader (option ROM or qboot) keeps it in low memory.
        let raw = unsafe { &*(start_info_address as *const RawStartInfo) };
        assert!(raw.magic == MAGIC, "not started by PVH");
        assert!(raw.version >= 1, "the PVH loader gives no memory map; QEMU 4.0 or newer does");
        StartInfo { raw }
    }

    /// The kernel command line, or nothing when there is none.
    pub fn command_line(&self) -> &'static str {
        if self.raw.command_line == 0 {
            return "";
        }
        let start = self.raw.command_line as *const u8;
        let mut length = 0;
        // SAFETY: the loader ends the text with a zero byte; the bound keeps a damaged one from running away.
        while length < COMMAND_LINE_MAX && unsafe { *start.add(length) } != 0 {
            length += 1;
        }
        // SAFETY: these bytes were just read, and nobody writes them.
        let bytes = unsafe { core::slice::from_raw_parts(start, length) };
        core::str::from_utf8(bytes).unwrap_or("")
    }

    /// Ranges of usable RAM, as (start, end).
    pub fn ram(&self) -> impl Iterator<Item = (usize, usize)> {
        let entries = self.raw.memory_map as *const RawMapEntry;
        (0..self.raw.memory_map_entries as usize)
            // SAFETY: the loader says that there are that many entries at that address.
            .map(move |i| unsafe { *entries.add(i) })
            .filter(|entry| entry.kind == RAM)
            .map(|entry| (entry.address as usize, (entry.address + entry.size) as usize))
    }
}
