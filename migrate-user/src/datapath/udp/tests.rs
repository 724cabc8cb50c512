//! Sink, gate and source over the loopback interface, by which every address of 127.0.0.0/8 is a peer.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    sync::Arc,
};

use migrate_common::{
    maps::DropReason,
    wire::{FrameHeader, FrameKind, Guard, HEADER_LEN, Packing},
};
use rustix::event::{EventfdFlags, eventfd};

use super::{Gate, UdpError, UdpGroup, UdpSink, UdpSource};
use crate::datapath::{FrameLayout, FramePath, FrameSink, FrameSource, Protection, protection::Sealer};

const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const STRANGER: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2));
const SESSION: u64 = 7;

/// Writes the frame of a session with this number and so much payload, which the number fills.
fn write(buffer: &mut [u8], session: u64, sequence: u32, payload: usize) -> usize {
    write_of(0, buffer, session, sequence, payload)
}

fn write_of(lane: u16, buffer: &mut [u8], session: u64, sequence: u32, payload: usize) -> usize {
    let header = FrameHeader {
        kind: FrameKind::Probe,
        descriptors: 0,
        session,
        epoch: 0,
        lane,
        sequence,
        guard: Guard::Checksum,
        packing: Packing::Plain,
        payload: payload as u32,
        checksum: 0,
    };
    buffer[HEADER_LEN..HEADER_LEN + payload].fill(sequence as u8);
    Sealer::new(Protection::Checksum).complete(buffer, &FramePath::bare(HERE), header).unwrap()
}

/// Sockets that let one session of `peer` in.
fn receiver(address: IpAddr, peer: IpAddr, count: usize) -> (UdpGroup, Arc<Gate>, Vec<UdpSource>) {
    let group = UdpGroup::open("lo", SocketAddr::new(address, 0), count).unwrap();
    let gate = Arc::new(Gate::default());
    gate.admit(SESSION, peer).unwrap();
    let source = |end: &Arc<_>| UdpSource::new(Arc::clone(end), Arc::clone(&gate));
    let sources = group.ends().iter().map(source).collect();
    (group, gate, sources)
}

fn address(group: &UdpGroup) -> SocketAddr {
    group.ends()[0].socket.local_addr().unwrap()
}

fn sink(group: &UdpGroup) -> UdpSink {
    let to = address(group);
    UdpSink::open("lo", to.ip(), 0, to).unwrap()
}

fn send(sink: &mut UdpSink, session: u64, sequence: u32, payload: usize) {
    let mut fill = Some(|buffer: &mut [u8]| write(buffer, session, sequence, payload));
    while !sink.frame(|buffer| fill.take().expect("filled once")(buffer)).unwrap() {}
}

fn flush(sink: &mut UdpSink) {
    while sink.flush().unwrap() > 0 {}
}

/// Numbers and payloads of what is there, of whole frames only.
fn received(source: &mut UdpSource, budget: usize) -> Vec<(u32, usize)> {
    let mut all = Vec::new();
    source.receive(budget, |datagram| {
        let datagram = datagram.expect("a socket's datagram can be read");
        let header = datagram.header().expect("the gate lets whole frames in");
        let mut payload = vec![0; header.payload as usize];
        assert_eq!(datagram.behind_header(0, payload.len()).gather(&mut payload), payload.len());
        assert!(payload.iter().all(|&byte| byte == header.sequence as u8));
        all.push((header.sequence, payload.len()));
    });
    all
}

fn everything(source: &mut UdpSource) -> Vec<(u32, usize)> {
    std::iter::from_fn(|| Some(received(source, 64)).filter(|some| !some.is_empty())).flatten().collect()
}

fn dropped(gate: &Gate) -> Vec<(&'static str, u64)> {
    let counts = gate.drops().into_iter().filter(|(_, frames)| *frames > 0);
    counts.map(|(reason, frames)| (reason.name(), frames)).collect()
}

#[test]
fn frames_of_all_lengths_arrive_in_order() {
    // Full frames, a shorter one that ends a batch, a longer one that does not fit, the longest there is.
    let lengths = [8000, 8000, 8000, 100, 100, 8000, 60_000, 60_000, 1, 0, 1400, 1400, 1400, 65_000];
    for batches in [true, false] {
        let (group, gate, mut sources) = receiver(HERE, HERE, 1);
        let mut sink = if batches { sink(&group) } else { sink(&group).without_batches() };
        let mut expected = Vec::new();
        for round in 0..20 {
            for (index, &payload) in lengths.iter().enumerate() {
                let number = round * lengths.len() as u32 + index as u32;
                send(&mut sink, SESSION, number, payload);
                expected.push((number, payload));
            }
        }
        flush(&mut sink);
        assert_eq!(everything(&mut sources[0]), expected, "batches: {batches}");
        assert_eq!((dropped(&gate), group.drops()), (vec![], 0));
    }
}

#[test]
fn ipv6_too() {
    let here = IpAddr::V6(Ipv6Addr::LOCALHOST);
    if UdpSocket::bind((here, 0)).is_err() {
        println!("skipped: ipv6_too: this machine has no IPv6");
        return;
    }
    let (group, _gate, mut sources) = receiver(here, here, 1);
    let mut sink = sink(&group);
    (0..100).for_each(|number| send(&mut sink, SESSION, number, 8000));
    flush(&mut sink);
    let expected: Vec<_> = (0..100).map(|number| (number, 8000)).collect();
    assert_eq!(everything(&mut sources[0]), expected);
}

#[test]
fn a_small_budget_leaves_the_rest_for_later() {
    let (group, _gate, mut sources) = receiver(HERE, HERE, 1);
    let mut sink = sink(&group);
    (0..40).for_each(|number| send(&mut sink, SESSION, number, 1400));
    flush(&mut sink);
    let wake = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    for first in (0..40).step_by(8) {
        // With something in the buffers there is nothing to wait for.
        sources[0].wait(&wake, 60_000).unwrap();
        let expected: Vec<_> = (first..first + 8).map(|number| (number, 1400)).collect();
        assert_eq!(received(&mut sources[0], 8), expected);
    }
    assert_eq!(received(&mut sources[0], 8), []);
}

#[test]
fn waiting_ends_when_it_is_woken() {
    let (_group, _gate, sources) = receiver(HERE, HERE, 1);
    let wake = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let waker = wake.try_clone().unwrap();
    let thread = std::thread::spawn(move || rustix::io::write(&waker, &1u64.to_ne_bytes()).unwrap());
    // The test hangs if it is not.
    sources[0].wait(&wake, 600_000).unwrap();
    thread.join().unwrap();
}

#[test]
fn strangers_are_counted_and_kept_out() {
    let (group, gate, mut sources) = receiver(HERE, HERE, 1);
    let to = address(&group);
    let mut frame = vec![0; 1000];
    let len = write(&mut frame, SESSION, 0, 500);
    let mut other = frame.clone();
    assert_eq!(write(&mut other, SESSION + 1, 0, 500), len);
    let changed = |at: usize, byte: u8| {
        let mut changed = frame[..len].to_vec();
        changed[at] = byte;
        changed
    };
    let peer = UdpSocket::bind((HERE, 0)).unwrap();
    for bytes in [
        &other[..len],     // another migration's
        &frame[..len - 1], // shorter than it says
        &frame[..len + 1], // longer
        &frame[..10],      // not even a header
        &[],               // nothing
        &changed(0, b'x'), // not ours
        &changed(4, 99),   // of another version
        &changed(5, 99),   // of no kind
        &frame[..len],
    ] {
        peer.send_to(bytes, to).unwrap();
    }
    UdpSocket::bind((STRANGER, 0)).unwrap().send_to(&frame[..len], to).unwrap();
    let mut came = Vec::new();
    // Refused ones are none, so that more may be there when none is given.
    for _ in 0..10 {
        came.extend(received(&mut sources[0], 1));
    }
    assert_eq!(came, [(0, 500)]);
    let expected = [
        ("truncated", 4),
        ("bad-magic", 1),
        ("bad-version", 1),
        ("malformed", 1),
        ("unknown-session", 1),
        ("wrong-peer", 1),
    ];
    assert_eq!(dropped(&gate), expected);
}

#[test]
fn whoever_is_dismissed_is_kept_out() {
    let (group, gate, mut sources) = receiver(HERE, HERE, 1);
    let mut sink = sink(&group);
    for (session, admitted) in [(SESSION, true), (8, false)] {
        send(&mut sink, session, 1, 100);
        flush(&mut sink);
        assert_eq!(everything(&mut sources[0]).is_empty(), !admitted);
    }
    gate.admit(8, HERE).unwrap();
    gate.dismiss(SESSION);
    for session in [SESSION, 8] {
        send(&mut sink, session, session as u32, 100);
    }
    flush(&mut sink);
    assert_eq!(everything(&mut sources[0]), [(8, 100)]);
    assert_eq!(dropped(&gate), [("unknown-session", 2)]);
}

#[test]
fn the_gate_is_as_large_as_the_map_of_the_xdp_program() {
    let gate = Gate::default();
    let mut sessions = 0..u64::from(migrate_common::maps::MAX_SESSIONS);
    assert!(sessions.all(|session| gate.admit(session, HERE).is_ok()));
    assert!(gate.admit(u64::MAX, HERE).unwrap_err().to_string().contains("wait"));
    // Once more for one that is in.
    gate.admit(0, STRANGER).unwrap();
    gate.dismiss(0);
    gate.admit(u64::MAX, HERE).unwrap();
}

/// Each lane has one socket, and neighbours have different ones; nothing is lost or doubled, and each keeps its order.
#[test]
fn a_group_shares_its_port() {
    let (group, _gate, mut sources) = receiver(HERE, HERE, 4);
    for lane in 0..32 {
        let mut sink = sink(&group);
        for number in 0..10 {
            let mut fill = Some(|buffer: &mut [u8]| write_of(lane, buffer, SESSION, number, 2000));
            while !sink.frame(|buffer| fill.take().expect("filled once")(buffer)).unwrap() {}
        }
        flush(&mut sink);
    }
    let shares: Vec<Vec<u32>> = sources
        .iter_mut()
        .map(|source| everything(source).into_iter().map(|(number, _)| number).collect())
        .collect();
    assert!(shares.iter().all(|share| share.len() == 80), "{shares:?}");
    assert!(shares.iter().all(|share| share.chunks(10).all(|flow| flow.iter().copied().eq(0..10))));
}

#[test]
fn the_port_is_nobody_elses() {
    let (group, ..) = receiver(HERE, HERE, 2);
    let to = address(&group);
    let error = UdpGroup::open("lo", to, 2).unwrap_err();
    assert!(matches!(error, UdpError::InUse { .. }), "{error}");
    assert!(error.to_string().contains("on lo") && error.to_string().contains("[migration] port"), "{error}");
    drop(group);
    UdpGroup::open("lo", to, 2).unwrap();
    let error = UdpGroup::open("no-such-nic", to, 1).unwrap_err().to_string();
    assert!(error.contains("no-such-nic"), "{error}");
}

#[test]
fn a_taken_source_port_is_none_needed() {
    let (group, _gate, mut sources) = receiver(HERE, HERE, 1);
    let taken = UdpSocket::bind((HERE, 0)).unwrap();
    let port = taken.local_addr().unwrap().port();
    let mut sink = UdpSink::open("lo", HERE, port, address(&group)).unwrap();
    send(&mut sink, SESSION, 1, 10);
    flush(&mut sink);
    assert_eq!(everything(&mut sources[0]), [(1, 10)]);
}

#[test]
fn a_peer_without_a_way_is_named() {
    let to = SocketAddr::new(IpAddr::V6(Ipv6Addr::LOCALHOST), 4791);
    let error = UdpSink::open("lo", HERE, 0, to).err().unwrap().to_string();
    assert!(error.contains("[::1]:4791 cannot be reached from lo") && error.contains("route"), "{error}");
}

/// Whether anybody is there, is not for the sink to judge.
#[test]
fn frames_that_nobody_wants_are_lost() {
    let (group, ..) = receiver(HERE, HERE, 1);
    let to = address(&group);
    let mut sink = sink(&group);
    drop(group);
    for number in 0..10 {
        send(&mut sink, SESSION, number, 8000);
        flush(&mut sink);
    }
    let group = UdpGroup::open("lo", to, 1).unwrap();
    let gate = Arc::new(Gate::default());
    gate.admit(SESSION, HERE).unwrap();
    let mut source = UdpSource::new(Arc::clone(&group.ends()[0]), gate);
    send(&mut sink, SESSION, 10, 8000);
    flush(&mut sink);
    assert_eq!(everything(&mut source), [(10, 8000)]);
}

/// As many as are promised fit; what does not is the kernel's to count.
#[test]
fn a_full_socket_counts_what_it_drops() {
    for mtu in [1500, 9000, 65_535] {
        let layout = FrameLayout::new(mtu, false, false).unwrap();
        let payload = layout.frame_len - layout.prefix - HEADER_LEN;
        let (group, _gate, mut sources) = receiver(HERE, HERE, 1);
        let mut sink = sink(&group).without_batches();
        let promised = group.frames(&layout) as u32;
        (0..promised).for_each(|number| send(&mut sink, SESSION, number, payload));
        assert_eq!(group.drops(), 0, "MTU {mtu}: {promised} frames fit");
        let mut sent = promised;
        while group.drops() == 0 {
            (0..100).for_each(|more| send(&mut sink, SESSION, sent + more, payload));
            sent += 100;
        }
        assert_eq!(everything(&mut sources[0]).len() as u64 + group.drops(), u64::from(sent));
    }
}

#[test]
fn reasons_are_those_of_the_xdp_program() {
    let names: Vec<_> = Gate::default().drops().iter().map(|(reason, _)| *reason).collect();
    assert_eq!(names, DropReason::ALL);
}
