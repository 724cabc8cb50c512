//! Every way in which a handover can go, with faults between any two steps.
//!
//! The two state machines and the journal's rules are the real ones; what is modelled is the world around them: two
//! hosts that die and come back, two VMMs, one connection with messages on their way, questions over new
//! connections, full disks, a human. A state is everything that tells two situations apart.

use super::{
    Answer, Change, DestinationHandover, DestinationStep, Recorded, Resolution, Seen, SessionState,
    SourceHandover, SourceStep, Verdict, Word,
    explorer::{Explored, Model, Move, explore},
};
use crate::vmm::Destroyed;

/// Faults in one handover.
const FAULTS: u8 = 6;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Vm {
    /// There never was one.
    Absent,
    /// There was one.
    Gone,
    /// It waits for its state.
    Waiting,
    /// It is whole and stopped.
    Stopped,
    Running,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Message {
    Prepare,
    Prepared,
    State,
    Loaded,
    Commit,
    Running,
    Abort,
}

/// Messages on their way in one direction, oldest first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Queue([Option<Message>; 2]);

impl Queue {
    fn push(&mut self, message: Message) {
        let slot = self.0.iter_mut().find(|slot| slot.is_none());
        *slot.expect("nobody sends more than two messages without an answer") = Some(message);
    }
    fn front(&self) -> Option<Message> {
        self.0[0]
    }
    fn pop(&mut self) -> Option<Message> {
        let first = self.0[0];
        self.0 = [self.0[1], None];
        first
    }
}

/// A question over a connection of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
enum Question {
    #[default]
    None,
    Asked,
    /// Asked by an agent that has died since: it may still be heard, nobody hears the answer.
    Orphaned,
    Answered(Verdict),
}

impl Question {
    fn asker_died(&mut self) {
        *self = match *self {
            Self::Asked | Self::Orphaned => Self::Orphaned,
            _ => Self::None,
        };
    }
}

/// A host and its agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Host<H> {
    /// The journal's records of the session.
    journal: SessionState,
    vm: Vm,
    /// Whether the agent runs.
    up: bool,
    /// Whether the host is gone for good.
    lost: bool,
    /// Whether the journal's disk takes nothing.
    disk_full: bool,
    /// Whether the VMM does not answer.
    hung: bool,
    /// Whether the agent took the session for over although that could not be written.
    over_unwritten: Option<Verdict>,
    /// The agent's half of the handover.
    handover: Option<H>,
    /// Whether its end of the connection is open.
    connected: bool,
    /// What it asks the other one.
    question: Question,
    /// With [`Order::ActThenWrite`]: a record that is still to be written, and whether its consequence has happened.
    late: Option<(Change, bool)>,
}

impl<H> Host<H> {
    /// The journal as the running agent knows it.
    fn known(&self) -> SessionState {
        let mut known = self.journal;
        if self.over_unwritten.is_some() {
            known.apply(Change::Concluded(self.over_unwritten));
        }
        known
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct World {
    source: Host<SourceHandover>,
    destination: Host<DestinationHandover>,
    to_source: Queue,
    to_destination: Queue,
    /// While it is cut nothing arrives and nothing gets lost.
    network: bool,
    faults_left: u8,
    /// The VM's state was sent.
    state_left: bool,
    /// The VM has executed at the destination.
    ran_there: bool,
    /// It has executed at the source after its state was sent.
    ran_on: bool,
    /// The destination's agent has seen that its VM ran.
    seen_running: bool,
    /// The source's VMM was killed.
    source_killed: bool,
    /// The destination's VMM was killed when the VM was the destination's, or ran there.
    owner_killed: bool,
    /// What must never happen has happened.
    violated: Option<&'static str>,
}

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

impl World {
    /// The VM runs at the source from now on.
    fn run_at_source(&mut self) {
        if self.ran_there {
            self.violated = Some("an older state of the VM runs again at the source");
        }
        self.ran_on |= self.state_left;
        self.source.vm = Vm::Running;
    }

    fn run_at_destination(&mut self) {
        if self.ran_on {
            self.violated = Some("an older state of the VM runs at the destination");
        }
        self.ran_there = true;
        self.destination.vm = Vm::Running;
    }

    /// Nothing on its way arrives, and both ends notice in their time.
    fn break_connection(&mut self) {
        self.to_source = Queue::default();
        self.to_destination = Queue::default();
        self.source.connected = false;
        self.destination.connected = false;
    }

    fn source_agent_dies(&mut self) {
        self.source.up = false;
        self.source.over_unwritten = None;
        self.source.handover = None;
        self.source.late = None;
        self.source.connected = false;
        self.source.question.asker_died();
        if self.destination.question == Question::Asked {
            self.destination.question = Question::None;
        }
        self.to_source = Queue::default();
    }

    fn destination_agent_dies(&mut self) {
        self.destination.up = false;
        self.destination.over_unwritten = None;
        self.destination.handover = None;
        self.destination.late = None;
        self.destination.connected = false;
        self.seen_running = false;
        self.destination.question.asker_died();
        if self.source.question != Question::None && !matches!(self.source.question, Question::Answered(_)) {
            self.source.question = Question::None;
        }
        self.to_destination = Queue::default();
    }

    fn kill_source_vm(&mut self) {
        self.source_killed |= self.source.vm != Vm::Gone;
        self.source.vm = Vm::Gone;
        self.source.hung = false;
    }

    fn kill_destination_vm(&mut self) {
        let ours = self.destination.journal.verdict == Some(Verdict::Accepted);
        self.owner_killed |= self.destination.vm == Vm::Running || ours;
        if self.destination.vm != Vm::Absent {
            self.destination.vm = Vm::Gone;
        }
        self.destination.hung = false;
    }
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

    fn source_moves(&self, world: &World, moves: &mut Moves) {
        let Some(handover) = world.source.handover else { return };
        let mut go = |name: &'static str, change: &dyn Fn(&mut World, &mut SourceHandover)| {
            let mut to = *world;
            let mut half = handover;
            change(&mut to, &mut half);
            to.source.handover = Some(half);
            moves.push(Move { name, fault: false, to });
        };
        let heard = world.to_source.front().filter(|_| world.network);
        // The end of a connection is noticed when everything before it was read; while the network is cut, in time.
        let hung_up =
            heard.is_none() && !(world.network && world.source.connected && world.destination.connected);
        match handover.step() {
            SourceStep::RecordOffer => {
                if heard == Some(Message::Prepared) {
                    go("source: offer", &|world, half| {
                        world.to_source.pop();
                        let written = self.write(&mut world.source, Change::Offered);
                        half.recorded(written);
                    });
                } else if heard.is_some() || hung_up {
                    go("source: refused", &|_, half| half.failed());
                }
            }
            SourceStep::Move => {
                if hung_up || heard == Some(Message::Abort) || world.source.vm == Vm::Gone {
                    go("source: fails", &|_, half| half.failed());
                } else if world.source.hung {
                    go("source: VMM does not answer", &|_, half| half.failed());
                } else if world.source.vm == Vm::Running {
                    go("source: stop", &|world, _| {
                        world.source.vm = Vm::Stopped;
                        Self::acted(&mut world.source);
                    });
                } else {
                    go("source: state", &|world, half| {
                        world.to_destination.push(Message::State);
                        world.state_left = true;
                        half.state_sent();
                    });
                }
            }
            SourceStep::RecordCommit => {
                go("source: write commit", &|world, half| {
                    let written = self.write(&mut world.source, Change::Committed);
                    half.recorded(written);
                });
            }
            SourceStep::AwaitLoaded => {
                if heard == Some(Message::Loaded) {
                    go("source: loaded", &|world, half| {
                        world.to_source.pop();
                        half.loaded();
                    });
                } else if heard.is_some() || hung_up {
                    go("source: not loaded", &|_, half| half.failed());
                }
            }
            SourceStep::SendCommit => {
                go("source: commit", &|world, half| {
                    let open = world.source.connected && world.destination.connected;
                    if open {
                        world.to_destination.push(Message::Commit);
                    }
                    Self::acted(&mut world.source);
                    half.sent(open);
                });
            }
            SourceStep::Hear => match heard {
                Some(Message::Running) => go("source: hears running", &|world, half| {
                    world.to_source.pop();
                    half.heard(Word::Running);
                }),
                Some(Message::Abort) => go("source: hears abort", &|world, half| {
                    world.to_source.pop();
                    half.heard(Word::Abort);
                }),
                _ if hung_up => go("source: hears nothing", &|_, half| half.heard(Word::Nothing)),
                _ => {}
            },
            SourceStep::Ask => match world.source.question {
                Question::Answered(verdict) => go("source: has an answer", &|world, half| {
                    world.source.question = Question::None;
                    half.answered(verdict);
                }),
                Question::None if world.network && world.destination.up => {
                    go("source: asks", &|world, _| world.source.question = Question::Asked);
                }
                _ => {}
            },
            SourceStep::RecordVerdict(verdict) => {
                // A claim of the destination may have been first.
                go("source: write what the human said", &|world, half| match world
                    .source
                    .journal
                    .decide(verdict)
                {
                    None => {
                        let written = self.write(&mut world.source, Change::Decided(verdict));
                        half.recorded(written);
                    }
                    Some(before) => half.recorded(before == Recorded::Written),
                });
            }
            SourceStep::LetRun | SourceStep::EndVm if world.source.hung => {}
            SourceStep::LetRun => go("source: lets it run", &|world, half| {
                if world.source.vm == Vm::Stopped {
                    world.run_at_source();
                }
                Self::acted(&mut world.source);
                half.done();
            }),
            SourceStep::EndVm => go("source: ends its VM", &|world, half| {
                if world.source.vm == Vm::Running {
                    world.violated = Some("a running VM is ended at the source");
                }
                world.source.vm = Vm::Gone;
                Self::acted(&mut world.source);
                half.done();
            }),
            SourceStep::RecordEnd(verdict) => {
                go("source: write the end", &|world, half| {
                    world.source.over_unwritten = world.source.disk_full.then_some(verdict);
                    if !world.source.disk_full {
                        world.source.journal.apply(Change::Concluded(Some(verdict)));
                    }
                    half.recorded(!world.source.disk_full);
                });
            }
            SourceStep::Closed(_) => {
                let mut to = *world;
                to.source.handover = None;
                to.source.connected = false;
                moves.push(Move { name: "source: over", fault: false, to });
            }
        }
        // It hangs up when it has no use for the connection any more.
        let talks = matches!(
            handover.step(),
            SourceStep::RecordOffer
                | SourceStep::Move
                | SourceStep::RecordCommit
                | SourceStep::AwaitLoaded
                | SourceStep::SendCommit
                | SourceStep::Hear
        );
        if world.source.connected && !talks {
            let mut to = *world;
            to.source.connected = false;
            to.to_source = Queue::default();
            moves.push(Move { name: "source: hangs up", fault: false, to });
        }
        if world.faults_left > 0 {
            let mut to = *world;
            to.faults_left -= 1;
            let half = to.source.handover.as_mut().unwrap();
            if handover.is_cancellable() {
                half.failed();
                moves.push(Move { name: "source: cancel or time-out", fault: true, to });
            } else if handover.step() == SourceStep::Hear {
                half.heard(Word::Nothing);
                moves.push(Move { name: "source: time-out after the commit", fault: true, to });
            }
        }
    }

    fn destination_moves(&self, world: &World, moves: &mut Moves) {
        let heard = world.to_destination.front().filter(|_| world.network);
        let Some(handover) = world.destination.handover else {
            if heard == Some(Message::Prepare) && world.destination.up {
                let mut to = *world;
                to.to_destination.pop();
                to.destination.handover = Some(DestinationHandover::default());
                moves.push(Move { name: "destination: prepare", fault: false, to });
            }
            return;
        };
        let mut go =
            |name: &'static str, fault: bool, change: &dyn Fn(&mut World, &mut DestinationHandover)| {
                if fault && world.faults_left == 0 {
                    return;
                }
                let mut to = *world;
                to.faults_left -= u8::from(fault);
                let mut half = handover;
                change(&mut to, &mut half);
                to.destination.handover = Some(half);
                moves.push(Move { name, fault, to });
            };
        let hung_up =
            heard.is_none() && !(world.network && world.source.connected && world.destination.connected);
        match handover.step() {
            DestinationStep::RecordWaiting => {
                go("destination: write waiting", false, &|world, half| {
                    let written = self.write(&mut world.destination, Change::Waiting);
                    half.recorded(outcome(written));
                });
            }
            DestinationStep::Receive => {
                match (world.destination.vm, heard) {
                    _ if hung_up => go("destination: alone", false, &|_, half| half.failed()),
                    (Vm::Absent, None) => {
                        go("destination: VMM waits", false, &|world, _| {
                            world.destination.vm = Vm::Waiting;
                            world.to_source.push(Message::Prepared);
                            Self::acted(&mut world.destination);
                        });
                        go("destination: no VMM", true, &|_, half| half.failed());
                    }
                    _ if world.destination.hung => {
                        go("destination: VMM does not answer", false, &|_, half| half.failed());
                    }
                    (Vm::Waiting, Some(Message::State)) => {
                        go("destination: loads", false, &|world, _| {
                            world.to_destination.pop();
                            world.destination.vm = Vm::Stopped;
                            world.to_source.push(Message::Loaded);
                        });
                        go("destination: cannot load", true, &|_, half| half.failed());
                    }
                    (Vm::Gone, _) => go("destination: VMM is gone", false, &|_, half| half.failed()),
                    (_, Some(Message::Commit)) => go("destination: committed", false, &|world, half| {
                        world.to_destination.pop();
                        half.committed();
                    }),
                    _ => {}
                }
                go("destination: time-out", true, &|_, half| half.failed());
            }
            DestinationStep::RecordAccepted => {
                go("destination: write accepted", false, &|world, half| match world
                    .destination
                    .journal
                    .decide(Verdict::Accepted)
                {
                    None => {
                        let change = Change::Decided(Verdict::Accepted);
                        let written = self.write(&mut world.destination, change);
                        half.recorded(outcome(written));
                    }
                    Some(before) => half.recorded(before),
                });
            }
            DestinationStep::Run => {
                if world.destination.hung {
                    go("destination: VMM does not run", false, &|_, half| half.ran(false));
                } else if world.destination.vm == Vm::Stopped {
                    go("destination: run", false, &|world, half| {
                        world.run_at_destination();
                        world.seen_running = true;
                        Self::acted(&mut world.destination);
                        half.ran(true);
                    });
                    go("destination: VMM refuses to run", true, &|_, half| half.ran(false));
                    go("destination: VMM dies as it runs", true, &|world, half| {
                        world.run_at_destination();
                        world.seen_running = true;
                        world.kill_destination_vm();
                        half.ran(false);
                    });
                } else {
                    go("destination: nothing to run", false, &|_, half| half.ran(false));
                }
            }
            DestinationStep::Confirm => go("destination: confirm", false, &|world, half| {
                if world.destination.connected && world.source.connected {
                    world.to_source.push(Message::Running);
                }
                half.told();
            }),
            DestinationStep::Look | DestinationStep::Destroy if world.destination.hung => {}
            DestinationStep::Look => go("destination: look", false, &|world, half| {
                half.seen(match world.destination.vm {
                    Vm::Running => Seen::Running,
                    Vm::Stopped => Seen::Stopped,
                    Vm::Absent | Vm::Gone | Vm::Waiting => Seen::Gone,
                });
            }),
            DestinationStep::Claim => match world.destination.question {
                Question::Answered(verdict) => go("destination: has an answer", false, &|world, half| {
                    world.destination.question = Question::None;
                    half.claimed(verdict);
                }),
                Question::None if world.network && world.source.up => {
                    go("destination: claims", false, &|world, _| {
                        world.destination.question = Question::Asked;
                    });
                }
                _ => {}
            },
            DestinationStep::Inquire => match world.destination.question {
                Question::Answered(verdict) => go("destination: knows", false, &|world, half| {
                    world.destination.question = Question::None;
                    half.claimed(verdict);
                }),
                Question::None if world.network && world.source.up && !world.source.known().is_open() => {
                    go("destination: inquires", false, &|world, _| {
                        world.destination.question = Question::Asked;
                    });
                }
                _ => {}
            },
            DestinationStep::Destroy => go("destination: destroy", false, &|world, half| {
                if world.destination.vm == Vm::Running {
                    world.violated = Some("a running VM is ended at the destination");
                }
                world.destination.vm = Vm::Gone;
                half.destroyed(if world.seen_running { Destroyed::MayHaveRun } else { Destroyed::NeverRan });
            }),
            DestinationStep::RecordRefused => {
                go("destination: write refused", false, &|world, half| {
                    let change = Change::Decided(Verdict::Refused);
                    let written = self.write(&mut world.destination, change);
                    half.recorded(outcome(written));
                });
            }
            DestinationStep::Abort => go("destination: abort", false, &|world, half| {
                if world.destination.connected && world.source.connected {
                    world.to_source.push(Message::Abort);
                }
                Self::acted(&mut world.destination);
                half.told();
            }),
            DestinationStep::RecordEnd(verdict) => {
                go("destination: write the end", false, &|world, half| {
                    world.destination.over_unwritten = world.destination.disk_full.then_some(verdict);
                    if !world.destination.disk_full {
                        world.destination.journal.apply(Change::Concluded(Some(verdict)));
                    }
                    half.recorded(outcome(!world.destination.disk_full));
                });
            }
            DestinationStep::Closed(_) => {
                let mut to = *world;
                to.destination.handover = None;
                to.destination.connected = false;
                moves.push(Move { name: "destination: over", fault: false, to });
            }
        }
    }

    /// Questions are answered from the journal, whatever else goes on.
    fn answers(&self, world: &World, moves: &mut Moves) {
        let asked = |question| matches!(question, Question::Asked | Question::Orphaned);
        let reply = |question: &mut Question, answer: Option<Verdict>| {
            *question = match (*question, answer) {
                (Question::Asked, Some(verdict)) => Question::Answered(verdict),
                _ => Question::None,
            };
        };
        if asked(world.source.question)
            && world.network
            && world.destination.up
            && world.destination.late.is_none()
        {
            let mut to = *world;
            let answer = match to.destination.known().asked_by_source() {
                Some(Answer::Stands(verdict)) => Some(verdict),
                Some(Answer::Decide(verdict)) if !to.destination.disk_full => {
                    to.destination.journal.apply(Change::Decided(verdict));
                    Some(verdict)
                }
                Some(Answer::Decide(_)) | None => None,
            };
            reply(&mut to.source.question, answer);
            moves.push(Move { name: "destination: answers", fault: false, to });
        }
        if asked(world.destination.question)
            && world.network
            && world.source.up
            && world.source.late.is_none()
        {
            let mut to = *world;
            // One that has died since it asked may have asked either; the answer to this one is written down.
            let whole = to.destination.handover.is_none_or(|half| half.step() != DestinationStep::Inquire);
            let answer = match to.source.known().claimed_by_destination(whole) {
                Some(Answer::Stands(verdict)) => Some(verdict),
                Some(Answer::Decide(verdict)) if !to.source.disk_full => {
                    to.source.journal.apply(Change::Decided(verdict));
                    Some(verdict)
                }
                Some(Answer::Decide(_)) | None => None,
            };
            reply(&mut to.destination.question, answer);
            moves.push(Move { name: "source: answers", fault: false, to });
        }
    }

    /// What happens to hosts and to the network.
    fn faults(world: &World, moves: &mut Moves) {
        if world.faults_left == 0 {
            return;
        }
        let mut fault = |name: &'static str, change: &dyn Fn(&mut World)| {
            let mut to = *world;
            to.faults_left -= 1;
            change(&mut to);
            moves.push(Move { name, fault: true, to });
        };
        if world.source.up {
            fault("source agent dies", &World::source_agent_dies);
        }
        if world.destination.up {
            fault("destination agent dies", &World::destination_agent_dies);
        }
        if world.source.vm != Vm::Gone {
            fault("source VMM dies", &World::kill_source_vm);
        }
        if !matches!(world.destination.vm, Vm::Absent | Vm::Gone) {
            fault("destination VMM dies", &World::kill_destination_vm);
        }
        if !world.source.lost {
            let reboot = |world: &mut World| {
                world.source_agent_dies();
                world.kill_source_vm();
            };
            fault("source host reboots", &reboot);
            fault("source host is lost", &|world| {
                reboot(world);
                world.source.lost = true;
            });
        }
        if !world.destination.lost {
            let reboot = |world: &mut World| {
                world.destination_agent_dies();
                world.kill_destination_vm();
            };
            fault("destination host reboots", &reboot);
            fault("destination host is lost", &|world| {
                reboot(world);
                world.destination.lost = true;
            });
        }
        if world.source.connected || world.destination.connected {
            fault("connection breaks", &World::break_connection);
        }
        if !world.source.disk_full && !world.source.lost {
            fault("source's disk is full", &|world| world.source.disk_full = true);
        }
        if !world.destination.disk_full && !world.destination.lost {
            fault("destination's disk is full", &|world| world.destination.disk_full = true);
        }
        if !world.source.hung && world.source.vm != Vm::Gone {
            fault("source VMM hangs", &|world| world.source.hung = true);
        }
        if !world.destination.hung && !matches!(world.destination.vm, Vm::Absent | Vm::Gone) {
            fault("destination VMM hangs", &|world| world.destination.hung = true);
        }
        if world.network {
            fault("network is cut", &|world| {
                world.network = false;
            });
        }
    }

    /// What supervisors and networks do by themselves.
    fn repairs(world: &World, moves: &mut Moves) {
        let mut repair = |name: &'static str, change: &dyn Fn(&mut World)| {
            let mut to = *world;
            change(&mut to);
            moves.push(Move { name, fault: false, to });
        };
        if !world.source.up && !world.source.lost {
            repair("source agent restarts", &|world| {
                world.source.up = true;
                let journal = world.source.journal;
                world.source.handover = journal.is_open().then(|| SourceHandover::recovered(journal));
            });
        }
        if !world.destination.up && !world.destination.lost {
            repair("destination agent restarts", &|world| {
                world.destination.up = true;
                let journal = world.destination.journal;
                world.destination.handover =
                    journal.is_open().then(|| DestinationHandover::recovered(journal));
            });
        }
        if !world.network {
            repair("network heals", &|world| world.network = true);
            // Questions have a time limit.
            if world.source.question == Question::Asked {
                repair("source: no answer", &|world| world.source.question = Question::Orphaned);
            }
            if world.destination.question == Question::Asked {
                repair("destination: no answer", &|world| world.destination.question = Question::Orphaned);
            }
        }
        if world.source.disk_full {
            repair("source has room again", &|world| world.source.disk_full = false);
        }
        if world.destination.disk_full {
            repair("destination has room again", &|world| world.destination.disk_full = false);
        }
        if world.source.hung {
            repair("source VMM answers again", &|world| world.source.hung = false);
        }
        if world.destination.hung {
            repair("destination VMM answers again", &|world| world.destination.hung = false);
        }
    }

    /// What a human may say who has read the warning.
    fn human(world: &World, moves: &mut Moves) {
        let mut says = |name: &'static str, change: &dyn Fn(&mut World)| {
            let mut to = *world;
            change(&mut to);
            moves.push(Move { name, fault: false, to });
        };
        let asks = |half: SourceHandover| half.step() == SourceStep::Ask;
        if world.source.handover.is_some_and(asks) {
            let resolve = |world: &mut World, resolution| {
                world.source.handover.as_mut().unwrap().resolved(resolution);
            };
            // It never ran there, and nobody there is about to run it.
            if !world.ran_there && !world.destination.up {
                says("human: keep it at the source", &|world| resolve(world, Resolution::KeepHere));
            }
            if world.destination.vm == Vm::Running {
                says("human: it runs there", &|world| resolve(world, Resolution::GiveUp));
            }
        }
        let doubts = |half: DestinationHandover| half.step() == DestinationStep::Inquire;
        if world.destination.handover.is_some_and(doubts) {
            let resolve = |world: &mut World, resolution| {
                world.destination.handover.as_mut().unwrap().resolved(resolution);
            };
            if world.ran_there {
                says("human: it ran there", &|world| resolve(world, Resolution::KeepHere));
            } else {
                says("human: it never ran there", &|world| resolve(world, Resolution::GiveUp));
            }
        }
        let claims = |half: DestinationHandover| half.step() == DestinationStep::Claim;
        if world.destination.handover.is_some_and(claims) {
            let resolve = |world: &mut World, resolution| {
                world.destination.handover.as_mut().unwrap().resolved(resolution);
            };
            // The source is gone for good, and it was not kept running there before.
            if world.source.lost && !world.ran_on {
                says("human: keep it at the destination", &|world| resolve(world, Resolution::KeepHere));
            }
            if world.source.vm == Vm::Stopped {
                says("human: the source keeps it", &|world| resolve(world, Resolution::GiveUp));
            }
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
