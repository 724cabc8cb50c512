//! What the source's agent can do next.

use super::super::{Change, Recorded, SourceHandover, SourceStep, Word};
use super::{
    Handover, Move, Moves,
    world::{Message, Question, Queue, Vm, World},
};

impl Handover {
    pub(super) fn source_moves(&self, world: &World, moves: &mut Moves) {
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
}
