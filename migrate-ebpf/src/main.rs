//! The migration NIC's bouncer.
//!
//! Every frame to the data port is either one of a registered session, from its peer, whole and of this
//! version, and is redirected to the AF_XDP socket of its queue; or it is counted by reason and dropped.
//! Everything else on the NIC goes to the kernel untouched.
#![no_std]
#![no_main]

use aya_ebpf::{
    bindings::xdp_action,
    helpers::generated::bpf_xdp_get_buff_len,
    macros::{map, xdp},
    maps::{HashMap, PerCpuArray, PerCpuHashMap, XskMap},
    programs::XdpContext,
};
use aya_log_ebpf::warn;
use migrate_common::{
    locate::{self, Claim, Packet},
    maps::{DROP_REASONS, DropReason, MAX_QUEUES, MAX_SESSIONS, Session, SessionCounters},
    wire::{FrameHeader, HEADER_LEN},
};

/// UDP port of the page stream, set by the loader.
#[unsafe(no_mangle)]
static DATA_PORT: u16 = 0;

#[map]
static SOCKETS: XskMap = XskMap::with_max_entries(MAX_QUEUES, 0);

#[map]
static SESSIONS: HashMap<u64, Session> = HashMap::with_max_entries(MAX_SESSIONS, 0);

#[map]
static COUNTERS: PerCpuHashMap<u64, SessionCounters> = PerCpuHashMap::with_max_entries(MAX_SESSIONS, 0);

#[map]
static DROPS: PerCpuArray<u64> = PerCpuArray::with_max_entries(DROP_REASONS, 0);

/// The linear part of a packet. With `xdp.frags` the rest lies in fragments that only helpers can reach;
/// all that is parsed here lies in the first.
struct Linear<'a>(&'a XdpContext);

impl Packet for Linear<'_> {
    #[inline(always)]
    fn bytes<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        let start = self.0.data() + offset;
        if start + N > self.0.data_end() {
            return None;
        }
        // SAFETY: the N bytes from `start` lie before data_end, which the verifier checks too; a byte
        // array has no alignment.
        Some(unsafe { *(start as *const [u8; N]) })
    }
}

#[xdp(frags)]
fn xferry(ctx: XdpContext) -> u32 {
    // SAFETY: the loader writes the value before the program is loaded; volatile keeps the compiler from
    // folding the initial 0 in.
    let port = unsafe { core::ptr::read_volatile(&raw const DATA_PORT) };
    let admitted = match locate::claim(&Linear(&ctx), port) {
        None => return xdp_action::XDP_PASS,
        Some(Claim::Plain(datagram)) => admit(&ctx, &datagram),
        Some(Claim::Unsupported) => Err(DropReason::Unsupported),
    };
    match admitted {
        Ok(action) => action,
        Err(reason) => refuse(&ctx, reason),
    }
}

#[inline(always)]
fn admit(ctx: &XdpContext, datagram: &locate::Datagram) -> Result<u32, DropReason> {
    // First what a stranger's frame fails at: it is to cost as little as it can.
    let bytes: [u8; HEADER_LEN] = Linear(ctx).bytes(datagram.payload_offset).ok_or(DropReason::Truncated)?;
    let header = FrameHeader::parse(&bytes).map_err(DropReason::from)?;
    // SAFETY: ctx.ctx is the kernel's xdp_md of this run.
    let frame_len = unsafe { bpf_xdp_get_buff_len(ctx.ctx) } as usize;
    if header.frame_len() != datagram.payload_len
        || datagram.payload_offset + datagram.payload_len > frame_len
    {
        return Err(DropReason::Truncated);
    }
    // SAFETY: the entry is plain data; a concurrent removal leaves it readable until the program returns.
    let session = unsafe { SESSIONS.get(header.session) }.ok_or(DropReason::UnknownSession)?;
    if session.peer != datagram.source {
        return Err(DropReason::WrongPeer);
    }
    // SAFETY: the context is valid for the whole run.
    let queue = unsafe { (*ctx.ctx).rx_queue_index };
    let action = SOCKETS.redirect(queue, 0).map_err(|_| DropReason::NoSocket)?;
    if let Some(counters) = COUNTERS.get_ptr_mut(header.session) {
        // SAFETY: a per-CPU value, and the program is not preempted by itself.
        unsafe {
            (*counters).frames += 1;
            (*counters).bytes += frame_len as u64;
        }
    }
    Ok(action)
}

/// Counts the drop. Says so in the log at the 1st, 2nd, 4th, 8th … of its reason: never once a frame.
#[inline(always)]
fn refuse(ctx: &XdpContext, reason: DropReason) -> u32 {
    if let Some(count) = DROPS.get_ptr_mut(reason as u32) {
        // SAFETY: a per-CPU value, and the program is not preempted by itself.
        let total = unsafe {
            *count += 1;
            *count
        };
        if total & (total - 1) == 0 {
            warn!(ctx, "dropped {} frames to the data port, reason {}", total, reason as u32);
        }
    }
    xdp_action::XDP_DROP
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
