//! Moves frames between the two ports, a thread for each direction.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::config::{Faults, WireConfig};
use super::line::{Frame, Line, Tally};
use super::nic::{BATCH, PacketNic};
use crate::lab::plan::{MIGRATION_NIC, Side};
use crate::lab::{Layout, lock, run_tool};
use crate::probe::Workers;

/// Longest wait for a frame: how late an order or the end is seen.
const LOOK: Duration = Duration::from_millis(20);
/// Ethernet header, a VLAN tag, and some to spare.
const OVERHEAD: usize = 64;

/// What became of the frames of one direction, as the relay counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Frames and what became of them.
    pub tally: Tally,
    /// Frames that the NIC at the far end did not take.
    pub refused: u64,
}

/// Orders for a direction, and its counters.
struct Direction {
    orders: Mutex<Option<(Faults, u64)>>,
    /// Changes with every order, so that the thread looks only then.
    version: AtomicU64,
    counters: Mutex<Counters>,
}

/// A wire that is up. Ends when it is dropped; frames then go nowhere.
pub struct Wire {
    directions: [Arc<Direction>; 2],
    namespace: String,
    _workers: Workers,
}

impl Wire {
    /// Takes over the two ports in the lab's switch, to which the migration NICs are cabled.
    ///
    /// # Errors
    /// If there are none.
    pub fn start(layout: &Layout, mtu: u32, config: &WireConfig) -> Result<Self> {
        let namespace = layout.switch();
        for side in Side::BOTH {
            // A veth leaves checksums and segments to a NIC that never comes: the relay would pass them on unmade.
            let host = layout.namespace(side);
            run_tool(
                "ip",
                &["netns", "exec", &host, "ethtool", "-K", MIGRATION_NIC, "tx", "off", "gso", "off"],
            )?;
        }
        let open = |side: Side| PacketNic::open(&namespace, side.migration_port()).map(Arc::new);
        let (a, b) = (open(Side::A)?, open(Side::B)?);
        let mut workers = Workers::new();
        let start = |workers: &mut Workers, from: &Arc<PacketNic>, to: &Arc<PacketNic>, faults, seed| {
            let direction = Arc::new(Direction {
                orders: Mutex::new(Some((faults, seed))),
                version: AtomicU64::new(1),
                counters: Mutex::default(),
            });
            let (from, to, shared) = (Arc::clone(from), Arc::clone(to), Arc::clone(&direction));
            let buffer = mtu as usize + OVERHEAD;
            workers.start("wire", move |stop| {
                let mut run = Run { from: &from, to: &to, direction: &shared, buffer, seen: 0 };
                run.run(|| stop.load(Ordering::Relaxed));
            })?;
            anyhow::Ok(direction)
        };
        let forth = start(&mut workers, &a, &b, config.a_to_b, config.seed)?;
        let back = start(&mut workers, &b, &a, config.b_to_a, !config.seed)?;
        Ok(Self { directions: [forth, back], namespace, _workers: workers })
    }

    fn direction(&self, from: Side) -> &Arc<Direction> {
        match from {
            Side::A => &self.directions[0],
            Side::B => &self.directions[1],
        }
    }

    /// Changes what happens to frames from `from` to the other host. Takes effect within [`LOOK`].
    pub fn set_from(&self, from: Side, faults: Faults, seed: u64) {
        let direction = self.direction(from);
        *lock(&direction.orders) = Some((faults, seed));
        direction.version.fetch_add(1, Ordering::Release);
    }

    /// Changes both directions.
    pub fn set(&self, config: &WireConfig) {
        self.set_from(Side::A, config.a_to_b, config.seed);
        self.set_from(Side::B, config.b_to_a, !config.seed);
        // Until both threads have looked.
        thread::sleep(LOOK * 2);
    }

    /// What became so far of frames from `from`.
    pub fn counters(&self, from: Side) -> Counters {
        *lock(&self.direction(from).counters)
    }

    /// Takes the link away for `time`: both hosts see their carrier go and come back.
    ///
    /// # Errors
    /// If the ports cannot be switched; then they may be left down.
    pub fn flap(&self, time: Duration) -> Result<()> {
        self.switch_ports("down")?;
        thread::sleep(time);
        self.switch_ports("up")
    }

    fn switch_ports(&self, to: &str) -> Result<()> {
        for side in Side::BOTH {
            run_tool("ip", &["-n", &self.namespace, "link", "set", side.migration_port(), to])?;
        }
        Ok(())
    }
}

/// One direction's thread.
struct Run<'a> {
    from: &'a PacketNic,
    to: &'a PacketNic,
    direction: &'a Direction,
    buffer: usize,
    /// Version of the orders that are followed.
    seen: u64,
}

impl Run<'_> {
    fn run(&mut self, stopped: impl Fn() -> bool) {
        let mut line = Line::new(Faults::default(), 0);
        let mut out = Vec::with_capacity(BATCH);
        let mut refused = 0;
        while !stopped() {
            self.follow(&mut line);
            let taken = self.take(&mut line);
            line.arrive(Instant::now(), BATCH, &mut out);
            let idle = taken == 0 && out.is_empty();
            refused += self.to.send(&out);
            out.drain(..).for_each(|frame: Frame| line.recycle(frame.buffer));
            *lock(&self.direction.counters) = Counters { tally: line.tally(), refused };
            if idle {
                let wait = line.next().map_or(LOOK, |next| next.saturating_duration_since(Instant::now()));
                self.from.wait(wait.min(LOOK));
            }
        }
    }

    fn follow(&mut self, line: &mut Line) {
        let version = self.direction.version.load(Ordering::Acquire);
        if version != self.seen {
            self.seen = version;
            if let Some((faults, seed)) = lock(&self.direction.orders).take() {
                line.set(faults, seed);
            }
        }
    }

    /// Puts what is there into the line, a batch at most.
    fn take(&self, line: &mut Line) -> usize {
        for taken in 0..BATCH {
            let mut buffer = line.buffer(self.buffer);
            match self.from.receive(&mut buffer) {
                Ok(Some(len)) => line.push(Frame { buffer, len }, Instant::now()),
                Ok(None) => {
                    line.recycle(buffer);
                    return taken;
                }
                Err(_) => {
                    // The NIC is down. It says so once, and once more when it is gone for good.
                    line.recycle(buffer);
                    thread::sleep(Duration::from_millis(1));
                    return taken;
                }
            }
        }
        BATCH
    }
}
