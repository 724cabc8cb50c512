//! Creating, binding and asking an AF_XDP socket.

use std::{
    os::fd::{AsFd, AsRawFd, OwnedFd},
    ptr::NonNull,
    sync::{Arc, atomic::AtomicU32},
};

use rustix::{
    io::Errno,
    mm::{MapFlags, ProtFlags},
    net::{
        AddressFamily, SocketFlags, SocketType, sockopt,
        xdp::{
            SocketAddrXdp, SocketAddrXdpFlags, XDP_PGOFF_RX_RING, XDP_PGOFF_TX_RING,
            XDP_UMEM_PGOFF_COMPLETION_RING, XDP_UMEM_PGOFF_FILL_RING, XdpMmapOffsets, XdpOptionsFlags,
            XdpRingOffset, XdpUmemReg, XdpUmemRegFlags,
        },
    },
};

use super::{
    XskError,
    ring::{Consumer, Producer, RingMemory, RingParts},
    rx::RxQueue,
    tx::{TX_BATCH_SIZE, TxQueue},
    umem::{CHUNK_SIZE, Umem},
};

/// How a socket may be bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BindMode {
    /// The driver reads and writes the UMEM itself, frames may span several buffers.
    ZeroCopyMultiBuffer,
    /// The driver reads and writes the UMEM itself, one buffer a frame.
    ZeroCopy,
    /// The kernel copies, frames may span several buffers.
    CopyMultiBuffer,
    /// The kernel copies, one buffer a frame.
    Copy,
}

impl BindMode {
    /// From the fastest to the one that always works.
    pub const LADDER: [Self; 4] =
        [Self::ZeroCopyMultiBuffer, Self::ZeroCopy, Self::CopyMultiBuffer, Self::Copy];

    /// Whether a frame may span several buffers.
    pub const fn multi_buffer(self) -> bool {
        matches!(self, Self::ZeroCopyMultiBuffer | Self::CopyMultiBuffer)
    }

    const fn zero_copy(self) -> bool {
        matches!(self, Self::ZeroCopyMultiBuffer | Self::ZeroCopy)
    }

    fn flags(self) -> SocketAddrXdpFlags {
        let mut flags = SocketAddrXdpFlags::XDP_USE_NEED_WAKEUP;
        // Always one of the two: without either some drivers copy silently.
        flags |=
            if self.zero_copy() { SocketAddrXdpFlags::XDP_ZEROCOPY } else { SocketAddrXdpFlags::XDP_COPY };
        if self.multi_buffer() {
            flags |= SocketAddrXdpFlags::XDP_USE_SG;
        }
        flags
    }
}

/// Where to bind and how large.
#[derive(Clone, Debug)]
pub struct SocketConfig {
    /// Interface name, for messages.
    pub interface: String,
    /// Interface index.
    pub ifindex: u32,
    /// Queue of the interface.
    pub queue: u32,
    /// Buffers for receiving, a power of two. Each holds up to 3840 bytes of a frame. None for a socket that only sends.
    pub rx_chunks: u32,
    /// Frames that can wait to be sent.
    pub tx_slots: u32,
    /// Chunks of [`CHUNK_SIZE`] a frame to send may take.
    pub tx_slot_chunks: u32,
}

/// What the kernel agreed to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Binding {
    /// Whether frames may span several buffers.
    pub multi_buffer: bool,
    /// Whether the driver works on the UMEM itself; as read back from the kernel, not as asked for.
    pub zero_copy: bool,
}

/// The kernel's counters of a socket, all since it was bound (`struct xdp_statistics`, `if_xdp.h`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Frames dropped for reasons other than a full ring.
    pub rx_dropped: u64,
    /// Frames dropped because the RX ring was full.
    pub rx_ring_full: u64,
    /// Frames dropped because no buffer was in the fill ring.
    pub rx_fill_ring_empty: u64,
    /// Descriptors on the TX ring that the kernel refused.
    pub tx_invalid_descs: u64,
}

/// A bound socket; its halves are handed out once, at creation.
pub struct Socket {
    fd: Arc<OwnedFd>,
    config: SocketConfig,
    binding: Binding,
}

struct MappedRing {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: an owned mapping without thread affinity.
unsafe impl Send for MappedRing {}
// SAFETY: the type gives no access to the bytes.
unsafe impl Sync for MappedRing {}
impl RingMemory for MappedRing {}

impl Drop for MappedRing {
    fn drop(&mut self) {
        // SAFETY: ours; the rings that point into it hold an Arc of self. Failure leaks it, no more.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

impl Socket {
    /// Binds by the first of `modes` that the kernel accepts.
    ///
    /// # Errors
    /// [`XskError::System`] of the last mode tried.
    pub fn open(config: &SocketConfig, modes: &[BindMode]) -> Result<(Self, TxQueue, RxQueue), XskError> {
        let mut last = XskError::Config("no bind mode was allowed".into());
        for &mode in modes {
            match Self::open_as(config, mode) {
                Ok(opened) => return Ok(opened),
                Err(XskError::System { operation: "bind", source, interface, queue })
                    if source != Errno::BUSY && source != Errno::PERM =>
                {
                    tracing::debug!(?mode, %source, interface, queue, "AF_XDP bind refused");
                    last = XskError::System { operation: "bind", source, interface, queue };
                }
                Err(other) => return Err(other),
            }
        }
        Err(last)
    }

    /// Binds a socket that only sends, out of `umem`: its first `tx_slots * tx_slot_chunks` chunks are the slots, frames may take in
    /// any other (see [`TxQueue::send_chain`]). The kernel pins all of it, which takes about 100 ms a GiB.
    ///
    /// # Errors
    /// [`XskError::System`]; [`XskError::Config`] when `config` has buffers for receiving or `umem` is too small.
    pub fn open_to_send(
        config: &SocketConfig,
        mode: BindMode,
        umem: &Umem,
    ) -> Result<(Self, TxQueue), XskError> {
        if config.rx_chunks != 0 || umem.len() < config.tx_len() {
            return Err(XskError::Config(format!(
                "a UMEM of {} bytes for {} slots of {} chunks and {} buffers for receiving",
                umem.len(),
                config.tx_slots,
                config.tx_slot_chunks,
                config.rx_chunks
            )));
        }
        let unbound = Unbound::new(config, umem)?;
        let (_, tx) = unbound.sending(umem)?;
        Ok((unbound.bind(mode)?, tx))
    }

    fn open_as(config: &SocketConfig, mode: BindMode) -> Result<(Self, TxQueue, RxQueue), XskError> {
        let umem = Umem::anonymous(config.rx_chunks as usize + config.tx_len() / CHUNK_SIZE)?;
        let unbound = Unbound::new(config, &umem)?;
        let (mut fill, tx) = unbound.sending(&umem)?;
        // Before bind: some zero-copy drivers look at the fill ring only once, when the queue starts.
        let filled = fill.stage((0..config.rx_chunks).map(|chunk| u64::from(chunk) * CHUNK_SIZE as u64));
        debug_assert!(filled, "the fill ring holds every chunk");
        fill.publish();
        let rx = unbound.receiving(fill, umem)?;
        Ok((unbound.bind(mode)?, tx, rx))
    }

    /// The descriptor, for the XDP program's socket map.
    pub fn fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// What the kernel agreed to.
    pub fn binding(&self) -> Binding {
        self.binding
    }

    /// The queue it is bound to.
    pub fn queue(&self) -> u32 {
        self.config.queue
    }

    /// The kernel's counters.
    ///
    /// # Errors
    /// [`XskError::System`].
    pub fn statistics(&self) -> Result<Statistics, XskError> {
        let raw = sockopt::xdp_statistics(&self.fd).map_err(|source| XskError::System {
            operation: "statistics",
            interface: self.config.interface.clone(),
            queue: self.config.queue,
            source,
        })?;
        Ok(Statistics {
            rx_dropped: raw.rx_dropped,
            rx_ring_full: raw.rx_ring_full.unwrap_or(0),
            rx_fill_ring_empty: raw.rx_fill_ring_empty_descs.unwrap_or(0),
            tx_invalid_descs: raw.tx_invalid_descs,
        })
    }
}

impl SocketConfig {
    /// Memory for frames to be sent, bytes.
    fn tx_len(&self) -> usize {
        self.tx_slots as usize * self.tx_slot_chunks as usize * CHUNK_SIZE
    }

    fn failed(&self, operation: &'static str) -> impl FnOnce(Errno) -> XskError + use<> {
        let (interface, queue) = (self.interface.clone(), self.queue);
        move |source| XskError::System { operation, interface, queue, source }
    }
}

/// A socket with its UMEM registered, on its way to a queue.
struct Unbound<'a> {
    config: &'a SocketConfig,
    fd: Arc<OwnedFd>,
    sizes: RingSizes,
}

impl<'a> Unbound<'a> {
    fn new(config: &'a SocketConfig, umem: &Umem) -> Result<Self, XskError> {
        let sizes = RingSizes::of(config)?;
        let fd = rustix::net::socket_with(AddressFamily::XDP, SocketType::RAW, SocketFlags::CLOEXEC, None)
            .map_err(config.failed("creation"))?;
        let registration = XdpUmemReg {
            addr: umem.start().addr().get() as u64,
            len: umem.len() as u64,
            chunk_size: CHUNK_SIZE as u32,
            headroom: 0,
            flags: XdpUmemRegFlags::empty(),
            tx_metadata_len: 0,
        };
        sockopt::set_xdp_umem_reg(&fd, registration).map_err(config.failed("UMEM registration"))?;
        Ok(Self { config, fd: Arc::new(fd), sizes })
    }

    fn offsets(&self) -> Result<XdpMmapOffsets, XskError> {
        sockopt::xdp_mmap_offsets(&self.fd).map_err(self.config.failed("ring offsets"))
    }

    fn ring<T>(&self, at: u64, offsets: &XdpRingOffset, size: u32) -> Result<RingParts<T>, XskError> {
        map_ring(&self.fd, at, offsets, size).map_err(self.config.failed("ring mapping"))
    }

    /// The fill ring, which the kernel wants in any case, and the sending half.
    fn sending(&self, umem: &Umem) -> Result<(Producer<u64>, TxQueue), XskError> {
        let Self { config, fd, sizes } = self;
        sockopt::set_xdp_umem_fill_ring_size(fd, sizes.fill).map_err(config.failed("fill ring"))?;
        sockopt::set_xdp_umem_completion_ring_size(fd, sizes.completion)
            .map_err(config.failed("completion ring"))?;
        sockopt::set_xdp_tx_ring_size(fd, sizes.tx).map_err(config.failed("TX ring"))?;
        let offsets = self.offsets()?;
        let fill = self.ring(XDP_UMEM_PGOFF_FILL_RING, &offsets.fr, sizes.fill)?;
        let completion = self.ring(XDP_UMEM_PGOFF_COMPLETION_RING, &offsets.cr, sizes.completion)?;
        let tx = self.ring(XDP_PGOFF_TX_RING, &offsets.tx, sizes.tx)?;
        let tx = TxQueue::new(
            Producer::new(tx),
            Consumer::new(completion),
            umem.clone(),
            u64::from(config.rx_chunks) * CHUNK_SIZE as u64,
            config.tx_slots,
            config.tx_slot_chunks,
            Some(Arc::clone(fd)),
        );
        Ok((Producer::new(fill), tx.with_budget(raise_tx_budget(fd, sizes.tx))))
    }

    fn receiving(&self, fill: Producer<u64>, umem: Umem) -> Result<RxQueue, XskError> {
        let Self { config, fd, sizes } = self;
        sockopt::set_xdp_rx_ring_size(fd, sizes.rx).map_err(config.failed("RX ring"))?;
        let rx = self.ring(XDP_PGOFF_RX_RING, &self.offsets()?.rx, sizes.rx)?;
        Ok(RxQueue::new(Consumer::new(rx), fill, umem, Some(Arc::clone(fd))))
    }

    fn bind(self, mode: BindMode) -> Result<Socket, XskError> {
        let Self { config, fd, .. } = self;
        let address = SocketAddrXdp::new(mode.flags(), config.ifindex, config.queue);
        rustix::net::bind(&fd, &address).map_err(config.failed("bind"))?;
        let options = sockopt::xdp_options(&fd).map_err(config.failed("options"))?;
        let binding = Binding {
            multi_buffer: mode.multi_buffer(),
            zero_copy: options.contains(XdpOptionsFlags::XDP_OPTIONS_ZEROCOPY),
        };
        Ok(Socket { fd, config: config.clone(), binding })
    }
}

struct RingSizes {
    fill: u32,
    completion: u32,
    rx: u32,
    tx: u32,
}

impl RingSizes {
    fn of(config: &SocketConfig) -> Result<Self, XskError> {
        let receives = config.rx_chunks > 0;
        if receives && !config.rx_chunks.is_power_of_two()
            || config.tx_slots == 0
            || config.tx_slot_chunks == 0
        {
            return Err(XskError::Config(format!(
                "rx_chunks ({}) must be a power of two, tx_slots ({}) and tx_slot_chunks ({}) at least 1",
                config.rx_chunks, config.tx_slots, config.tx_slot_chunks
            )));
        }
        let tx = (config.tx_slots * config.tx_slot_chunks).next_power_of_two();
        // All chunks in flight fit every ring: neither filling nor completing can ever find one full.
        Ok(Self { fill: config.rx_chunks.max(1), completion: tx, rx: config.rx_chunks, tx })
    }
}

/// `XDP_MAX_TX_SKB_BUDGET` of `include/uapi/linux/if_xdp.h`, since Linux 6.17.
const XDP_MAX_TX_SKB_BUDGET: libc::c_int = 9;

/// Lets one call of the kernel send all descriptors of a TX ring of that size in copy mode. Returns how many it sends.
fn raise_tx_budget(fd: &OwnedFd, ring: u32) -> u32 {
    // SAFETY: the option is a 32-bit integer, of which the kernel reads as many bytes as it is told.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_XDP,
            XDP_MAX_TX_SKB_BUDGET,
            (&raw const ring).cast(),
            size_of_val(&ring) as libc::socklen_t,
        )
    };
    // An older kernel does not know it; one that does takes no less than 32.
    if result == 0 { ring } else { TX_BATCH_SIZE }
}

fn map_ring<T>(
    fd: &OwnedFd,
    page_offset: u64,
    offsets: &XdpRingOffset,
    size: u32,
) -> rustix::io::Result<RingParts<T>> {
    let len = offsets.desc as usize + size as usize * size_of::<T>();
    // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing.
    let start = unsafe {
        rustix::mm::mmap(
            std::ptr::null_mut(),
            len,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::SHARED | MapFlags::POPULATE,
            fd,
            page_offset,
        )
    }?;
    let start = NonNull::new(start.cast::<u8>()).ok_or(Errno::NOMEM)?;
    let memory = MappedRing { start, len };
    let at = |offset: u64| {
        // SAFETY: the kernel's offsets lie within the ring that it just mapped.
        unsafe { start.add(offset as usize) }
    };
    Ok(RingParts {
        producer: at(offsets.producer).cast::<AtomicU32>(),
        consumer: at(offsets.consumer).cast::<AtomicU32>(),
        flags: offsets.flags.map(|offset| at(offset).cast::<AtomicU32>()),
        slots: at(offsets.desc).cast::<T>(),
        size,
        memory: Arc::new(memory),
    })
}
