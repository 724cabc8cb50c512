//! What happens to agents without their doing: questions from the other one, faults, repairs, humans.

use super::super::{
    Answer, Change, DestinationHandover, DestinationStep, Resolution, SourceHandover, SourceStep, Verdict,
};
use super::{
    Handover, Move, Moves,
    world::{Question, Vm, World},
};

impl Handover {
    /// Questions are answered from the journal, whatever else goes on.
    pub(super) fn answers(&self, world: &World, moves: &mut Moves) {
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
    pub(super) fn faults(world: &World, moves: &mut Moves) {
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
    pub(super) fn repairs(world: &World, moves: &mut Moves) {
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
    pub(super) fn human(world: &World, moves: &mut Moves) {
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
