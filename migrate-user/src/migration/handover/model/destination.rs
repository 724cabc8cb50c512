//! What the destination's agent can do next.

use super::super::{Change, DestinationHandover, DestinationStep, Seen, Verdict};
use super::{
    Handover, Move, Moves, outcome,
    world::{Message, Question, Vm, World},
};
use crate::vmm::Destroyed;

impl Handover {
    pub(super) fn destination_moves(&self, world: &World, moves: &mut Moves) {
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
}
