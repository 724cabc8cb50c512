//! Every way in which a handover can go, with faults between any two steps.
//!
//! The two state machines and the journal's rules are the real ones; what is modelled is the world around them: two
//! hosts that die and come back, two VMMs, one connection with messages on their way, questions over new
//! connections, full disks, a human. A state is everything that tells two situations apart.

mod destination;
mod environment;
mod source;
mod world;

use super::{
    Change, DestinationStep, Recorded, SessionState, SourceHandover, SourceStep, Verdict,
    explorer::{Explored, Model, Move, explore},
};
use world::{Host, Message, Question, Queue, Vm, World};

/// Faults in one handover.
const FAULTS: u8 = 6;

/// Whether agents write before they act.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    WriteThenAct,
    /// The mutation that must be noticed.
    ActThenWrite,
}

struct Handover {
    faults: u8,
    order: Order,
}

type Moves = Vec<Move<World>>;

const fn outcome(written: bool) -> Recorded {
    if written { Recorded::Written } else { Recorded::Failed }
}

impl Handover {
    /// Adds `change` to a journal, or puts it off. Whether that could be done.
    fn write<H>(&self, host: &mut Host<H>, change: Change) -> bool {
        if host.disk_full {
            return false;
        }
        match self.order {
            Order::WriteThenAct => host.journal.apply(change),
            Order::ActThenWrite => host.late = Some((change, false)),
        }
        true
    }

    /// An action that a record allowed has happened.
    fn acted<H>(host: &mut Host<H>) {
        if let Some((_, acted)) = &mut host.late {
            *acted = true;
        }
    }
}

impl Model for Handover {
    type State = World;

    fn initial(&self) -> World {
        let mut to_destination = Queue::default();
        to_destination.push(Message::Prepare);
        World {
            source: Host {
                journal: SessionState::default(),
                vm: Vm::Running,
                up: true,
                lost: false,
                disk_full: false,
                hung: false,
                over_unwritten: None,
                handover: Some(SourceHandover::default()),
                connected: true,
                question: Question::None,
                late: None,
            },
            destination: Host {
                journal: SessionState::default(),
                vm: Vm::Absent,
                up: true,
                lost: false,
                disk_full: false,
                hung: false,
                over_unwritten: None,
                handover: None,
                connected: true,
                question: Question::None,
                late: None,
            },
            to_source: Queue::default(),
            to_destination,
            network: true,
            faults_left: self.faults,
            state_left: false,
            ran_there: false,
            ran_on: false,
            seen_running: false,
            source_killed: false,
            owner_killed: false,
            violated: None,
        }
    }

    fn moves(&self, world: &World, moves: &mut Moves) {
        match world.source.late {
            Some((change, true)) => {
                let mut to = *world;
                to.source.journal.apply(change);
                to.source.late = None;
                moves.push(Move { name: "source: writes at last", fault: false, to });
            }
            _ => self.source_moves(world, moves),
        }
        match world.destination.late {
            Some((change, true)) => {
                let mut to = *world;
                to.destination.journal.apply(change);
                to.destination.late = None;
                moves.push(Move { name: "destination: writes at last", fault: false, to });
            }
            _ => self.destination_moves(world, moves),
        }
        self.answers(world, moves);
        Self::faults(world, moves);
        Self::repairs(world, moves);
        Self::human(world, moves);
    }

    fn violation(&self, world: &World) -> Option<&'static str> {
        if world.source.vm == Vm::Running && world.destination.vm == Vm::Running {
            return Some("two hosts run the VM");
        }
        world.violated
    }

    /// Nobody has anything left to do, and the VM runs once; unless it died of its own.
    fn settled(&self, world: &World) -> bool {
        let rests = (world.source.lost || world.source.up && world.source.handover.is_none())
            && (world.destination.lost || world.destination.up && world.destination.handover.is_none());
        let runs = [world.source.vm, world.destination.vm].iter().filter(|&&vm| vm == Vm::Running).count();
        let tidy = [world.source.vm, world.destination.vm]
            .iter()
            .all(|&vm| !matches!(vm, Vm::Waiting | Vm::Stopped));
        // The host that ran it last, or was told that it may, is gone for good: whether what the other one has may run
        // is for a human to weigh.
        let weighs = (world.destination.lost
            && (world.ran_there || world.source.journal.verdict == Some(Verdict::Accepted))
            && world.source.handover.is_some_and(|half| half.step() == SourceStep::Ask))
            || (world.source.lost
                && world.ran_on
                && world.destination.handover.is_some_and(|half| half.step() == DestinationStep::Claim));
        weighs || rests && tidy && (runs == 1 || runs == 0 && (world.source_killed || world.owner_killed))
    }
}

fn explored(faults: u8, order: Order) -> Result<Explored, String> {
    explore(&Handover { faults, order })
}

/// At most [`FAULTS`] faults in one handover, at any moments, and everything that can follow.
#[test]
fn no_interleaving_of_faults_loses_or_doubles_the_vm() {
    let begun = std::time::Instant::now();
    let found = explored(FAULTS, Order::WriteThenAct).unwrap_or_else(|story| panic!("{story}"));
    println!(
        "handover model: {} states, {} moves, {} settled ends, up to {FAULTS} faults, {:.1} s",
        found.states,
        found.moves,
        found.settled,
        begun.elapsed().as_secs_f64()
    );
    assert!(found.states >= 1_000_000, "{found:?}");
}

#[test]
fn a_journal_written_after_acting_is_noticed() {
    let story = explored(2, Order::ActThenWrite).unwrap_err();
    println!("handover model, journal written after acting: {story}");
}
