//! The world around the two state machines: hosts, VMMs, what is on its way, and what has happened to the VM.

use super::super::{Change, DestinationHandover, SessionState, SourceHandover, Verdict};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Vm {
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
pub(super) enum Message {
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
pub(super) struct Queue(pub(super) [Option<Message>; 2]);

impl Queue {
    pub(super) fn push(&mut self, message: Message) {
        let slot = self.0.iter_mut().find(|slot| slot.is_none());
        *slot.expect("nobody sends more than two messages without an answer") = Some(message);
    }
    pub(super) fn front(&self) -> Option<Message> {
        self.0[0]
    }
    pub(super) fn pop(&mut self) -> Option<Message> {
        let first = self.0[0];
        self.0 = [self.0[1], None];
        first
    }
}

/// A question over a connection of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) enum Question {
    #[default]
    None,
    Asked,
    /// Asked by an agent that has died since: it may still be heard, nobody hears the answer.
    Orphaned,
    Answered(Verdict),
}

impl Question {
    pub(super) fn asker_died(&mut self) {
        *self = match *self {
            Self::Asked | Self::Orphaned => Self::Orphaned,
            _ => Self::None,
        };
    }
}

/// A host and its agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Host<H> {
    /// The journal's records of the session.
    pub(super) journal: SessionState,
    pub(super) vm: Vm,
    /// Whether the agent runs.
    pub(super) up: bool,
    /// Whether the host is gone for good.
    pub(super) lost: bool,
    /// Whether the journal's disk takes nothing.
    pub(super) disk_full: bool,
    /// Whether the VMM does not answer.
    pub(super) hung: bool,
    /// Whether the agent took the session for over although that could not be written.
    pub(super) over_unwritten: Option<Verdict>,
    /// The agent's half of the handover.
    pub(super) handover: Option<H>,
    /// Whether its end of the connection is open.
    pub(super) connected: bool,
    /// What it asks the other one.
    pub(super) question: Question,
    /// With [`Order::ActThenWrite`]: a record that is still to be written, and whether its consequence has happened.
    pub(super) late: Option<(Change, bool)>,
}

impl<H> Host<H> {
    /// The journal as the running agent knows it.
    pub(super) fn known(&self) -> SessionState {
        let mut known = self.journal;
        if self.over_unwritten.is_some() {
            known.apply(Change::Concluded(self.over_unwritten));
        }
        known
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct World {
    pub(super) source: Host<SourceHandover>,
    pub(super) destination: Host<DestinationHandover>,
    pub(super) to_source: Queue,
    pub(super) to_destination: Queue,
    /// While it is cut nothing arrives and nothing gets lost.
    pub(super) network: bool,
    pub(super) faults_left: u8,
    /// The VM's state was sent.
    pub(super) state_left: bool,
    /// The VM has executed at the destination.
    pub(super) ran_there: bool,
    /// It has executed at the source after its state was sent.
    pub(super) ran_on: bool,
    /// The destination's agent has seen that its VM ran.
    pub(super) seen_running: bool,
    /// The source's VMM was killed.
    pub(super) source_killed: bool,
    /// The destination's VMM was killed when the VM was the destination's, or ran there.
    pub(super) owner_killed: bool,
    /// What must never happen has happened.
    pub(super) violated: Option<&'static str>,
}

impl World {
    /// The VM runs at the source from now on.
    pub(super) fn run_at_source(&mut self) {
        if self.ran_there {
            self.violated = Some("an older state of the VM runs again at the source");
        }
        self.ran_on |= self.state_left;
        self.source.vm = Vm::Running;
    }

    pub(super) fn run_at_destination(&mut self) {
        if self.ran_on {
            self.violated = Some("an older state of the VM runs at the destination");
        }
        self.ran_there = true;
        self.destination.vm = Vm::Running;
    }

    /// Nothing on its way arrives, and both ends notice in their time.
    pub(super) fn break_connection(&mut self) {
        self.to_source = Queue::default();
        self.to_destination = Queue::default();
        self.source.connected = false;
        self.destination.connected = false;
    }

    pub(super) fn source_agent_dies(&mut self) {
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

    pub(super) fn destination_agent_dies(&mut self) {
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

    pub(super) fn kill_source_vm(&mut self) {
        self.source_killed |= self.source.vm != Vm::Gone;
        self.source.vm = Vm::Gone;
        self.source.hung = false;
    }

    pub(super) fn kill_destination_vm(&mut self) {
        let ours = self.destination.journal.verdict == Some(Verdict::Accepted);
        self.owner_killed |= self.destination.vm == Vm::Running || ours;
        if self.destination.vm != Vm::Absent {
            self.destination.vm = Vm::Gone;
        }
        self.destination.hung = false;
    }
}
