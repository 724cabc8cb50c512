//! The ring's protocol against a modelled kernel, every state visited.
//!
//! Memory is modelled as C11 and the kernel's LKMM agree on it for this protocol: a load of a counter may return any
//! value that was stored and that this side has not seen a newer one of; a load-acquire that reads a store-release
//! learns all that the storing side knew; a slot may be accessed only by who knows of the other side's last access to
//! it. Each call of the ring's has one load or one store of a counter, so that calls and the choice of the value
//! loaded are all the interleavings there are.
//!
//! One side is the code under test, the other the kernel's (`net/xdp/xsk_queue.h`), written down here again.

use std::{
    cell::{Cell, RefCell},
    collections::HashSet,
    rc::Rc,
};

use super::*;

const OURS: usize = 0;
const KERNEL: usize = 1;

/// What is wrong on purpose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Mutation {
    #[default]
    None,
    /// Our stores do not publish what was written before.
    RelaxedStore,
    /// Our loads do not see what was published.
    RelaxedLoad,
    /// One slot more is taken for free than there is.
    OneTooMany,
    /// Our accesses are to the neighbour of the right slot from the moment that counters wrap.
    WrongSlotAfterWrap,
    /// What is published is one slot more than was written, or released one more than was read.
    OneTooFar,
}

/// A value of a counter, and what is known to who loads it with acquire.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Stored {
    value: u32,
    known: Option<[u32; 2]>,
}

/// A counter: one side stores, the other loads.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Counter {
    /// What can still be loaded, oldest first.
    values: Vec<Stored>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Slot {
    content: u32,
    /// Time of each side's last access.
    accessed: [u32; 2],
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Memory {
    producer: Counter,
    consumer: Counter,
    slots: Vec<Slot>,
    /// What each side knows of either side's time; the own time is its own entry.
    known: [[u32; 2]; 2],
}

impl Memory {
    fn new(size: u32, start: u32) -> Self {
        let counter = Counter { values: vec![Stored { value: start, known: Some([0, 0]) }] };
        let slots = vec![Slot { content: u32::MAX, accessed: [0, 0] }; size as usize];
        Self { producer: counter.clone(), consumer: counter, slots, known: [[1, 0], [0, 1]] }
    }

    fn counter(&mut self, producer: bool) -> &mut Counter {
        if producer { &mut self.producer } else { &mut self.consumer }
    }

    /// `age` chooses among the values: 0 is the newest.
    fn load(&mut self, side: usize, producer: bool, acquire: bool, age: usize) -> u32 {
        let values = &mut self.counter(producer).values;
        let at = values.len() - 1 - age.min(values.len() - 1);
        // Never again an older one.
        values.drain(..at);
        let Stored { value, known } = values[0].clone();
        if let Some(known) = known.filter(|_| acquire) {
            for (mine, theirs) in self.known[side].iter_mut().zip(known) {
                *mine = (*mine).max(theirs);
            }
        }
        value
    }

    fn store(&mut self, side: usize, producer: bool, release: bool, value: u32) {
        let known = release.then_some(self.known[side]);
        self.counter(producer).values.push(Stored { value, known });
        self.known[side][side] += 1;
    }

    /// The slot, if the other side's last access to it is known to `side`.
    fn slot(&mut self, side: usize, index: u32) -> Result<&mut Slot, String> {
        let at = index as usize % self.slots.len();
        let (now, other) = (self.known[side][side], self.known[side][1 - side]);
        let slot = &mut self.slots[at];
        if slot.accessed[1 - side] > other {
            return Err(format!("slot {at} is touched by both sides at once"));
        }
        slot.accessed[side] = now;
        Ok(slot)
    }
}

/// Our side's access to the model. What goes wrong is kept, for calls that cannot fail.
#[derive(Clone)]
struct Model {
    memory: Rc<RefCell<Memory>>,
    /// Which value the next load returns.
    age: Rc<Cell<usize>>,
    wrong: Rc<RefCell<Option<String>>>,
    mutation: Mutation,
    /// Counter at which the model began.
    start: u32,
}

impl Model {
    fn load(&self, producer: bool, order: Ordering) -> u32 {
        let acquire = order == Ordering::Acquire && self.mutation != Mutation::RelaxedLoad;
        self.memory.borrow_mut().load(OURS, producer, acquire, self.age.get())
    }

    fn store(&self, producer: bool, value: u32, order: Ordering) {
        let release = order == Ordering::Release && self.mutation != Mutation::RelaxedStore;
        let value = value.wrapping_add(u32::from(self.mutation == Mutation::OneTooFar));
        self.memory.borrow_mut().store(OURS, producer, release, value);
    }

    fn at(&self, index: u32) -> u32 {
        let wrapped = index < self.start;
        index.wrapping_add(u32::from(self.mutation == Mutation::WrongSlotAfterWrap && wrapped))
    }

    fn note<V>(&self, result: Result<V, String>) -> Option<V> {
        result.map_err(|problem| self.wrong.borrow_mut().get_or_insert(problem).truncate(200)).ok()
    }
}

impl Access<u32> for Model {
    fn size(&self) -> u32 {
        self.memory.borrow().slots.len() as u32 + u32::from(self.mutation == Mutation::OneTooMany)
    }

    fn load_producer(&self, order: Ordering) -> u32 {
        self.load(true, order)
    }

    fn store_producer(&self, value: u32, order: Ordering) {
        self.store(true, value, order);
    }

    fn load_consumer(&self, order: Ordering) -> u32 {
        self.load(false, order)
    }

    fn store_consumer(&self, value: u32, order: Ordering) {
        self.store(false, value, order);
    }

    unsafe fn write(&self, index: u32, item: u32) {
        let mut memory = self.memory.borrow_mut();
        if let Some(slot) = self.note(memory.slot(OURS, self.at(index))) {
            slot.content = item;
        }
    }

    unsafe fn read(&self, index: u32) -> u32 {
        let mut memory = self.memory.borrow_mut();
        self.note(memory.slot(OURS, self.at(index))).map_or(u32::MAX, |slot| slot.content)
    }

    fn flags(&self) -> Option<u32> {
        None
    }
}

/// A side's cursors: our `next` and what was seen of the other's, or the kernel's cached ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Cursors {
    next: u32,
    seen: u32,
    /// What was last stored.
    stored: u32,
}

/// One state of the world.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    memory: Memory,
    ours: Cursors,
    kernel: Cursors,
    /// Items written and items read so far; item number `n` has the content `n`.
    written: u32,
    read: u32,
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Put { items: u32, age: usize },
    Publish,
    Take { age: usize },
    Release,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum We {
    Produce,
    Consume,
}

struct Explorer {
    we: We,
    size: u32,
    start: u32,
    items: u32,
    mutation: Mutation,
}

impl Explorer {
    /// Visits every state. Returns how many there are, or what goes wrong in one.
    fn explore(&self) -> Result<usize, String> {
        let cursors = Cursors { next: self.start, seen: self.start, stored: self.start };
        let memory = Memory::new(self.size, self.start);
        let mut open = vec![World { memory, ours: cursors, kernel: cursors, written: 0, read: 0 }];
        let mut visited: HashSet<World> = open.iter().cloned().collect();
        let mut complete = false;
        while let Some(world) = open.pop() {
            complete |= world.read == self.items;
            for step in self.steps(&world) {
                let next = self.step(&world, step).map_err(|problem| format!("{problem} ({step:?})"))?;
                if visited.insert(next.clone()) {
                    open.push(next);
                }
            }
        }
        if complete { Ok(visited.len()) } else { Err("not all items came through".into()) }
    }

    fn steps(&self, world: &World) -> Vec<Step> {
        let mut steps = vec![];
        let (producer, consumer) = match self.we {
            We::Produce => (&world.ours, &world.kernel),
            We::Consume => (&world.kernel, &world.ours),
        };
        for items in 1..=2.min(self.items - world.written) {
            steps.extend((0..world.memory.consumer.values.len()).map(|age| Step::Put { items, age }));
        }
        steps.extend((0..world.memory.producer.values.len()).map(|age| Step::Take { age }));
        if producer.next != producer.stored {
            steps.push(Step::Publish);
        }
        if consumer.next != consumer.stored {
            steps.push(Step::Release);
        }
        steps
    }

    fn step(&self, world: &World, step: Step) -> Result<World, String> {
        let mut after = world.clone();
        let producing = matches!(step, Step::Put { .. } | Step::Publish);
        let got = if producing == (self.we == We::Produce) {
            self.ours(&mut after, step)?
        } else {
            self.kernel(&mut after, step)?
        };
        if let Some(item) = got {
            if item != world.read || item >= world.written {
                return Err(format!("item {item} came instead of {}", world.read));
            }
            after.read += 1;
        }
        if after.written - after.read > self.size {
            return Err("more items are under way than there are slots".into());
        }
        Ok(after)
    }

    /// The code under test. An item that was taken, if any.
    fn ours(&self, world: &mut World, step: Step) -> Result<Option<u32>, String> {
        let memory = Rc::new(RefCell::new(world.memory.clone()));
        let age = match step {
            Step::Put { age, .. } | Step::Take { age } => age,
            Step::Publish | Step::Release => 0,
        };
        let wrong = Rc::default();
        let ring = Model {
            memory: Rc::clone(&memory),
            age: Rc::new(Cell::new(age)),
            wrong: Rc::clone(&wrong),
            mutation: self.mutation,
            start: self.start,
        };
        let Cursors { next, seen, .. } = world.ours;
        let mut got = None;
        match self.we {
            We::Produce => {
                let mut side = Producer { ring, item: PhantomData, next, seen_consumer: seen };
                match step {
                    Step::Put { items, .. } => {
                        let numbers: Vec<u32> = (world.written..world.written + items).collect();
                        if side.stage(numbers.into_iter()) {
                            world.written += items;
                        } else if side.next != next {
                            return Err("a part of what did not fit was written".into());
                        }
                    }
                    _ => {
                        side.publish();
                        world.ours.stored = side.next;
                    }
                }
                (world.ours.next, world.ours.seen) = (side.next, side.seen_consumer);
            }
            We::Consume => {
                let mut side = Consumer { ring, item: PhantomData, next, seen_producer: seen };
                match step {
                    Step::Take { .. } => got = side.take(),
                    _ => {
                        side.release();
                        world.ours.stored = side.next;
                    }
                }
                (world.ours.next, world.ours.seen) = (side.next, side.seen_producer);
            }
        }
        if let Some(problem) = wrong.take() {
            return Err(problem);
        }
        world.memory = memory.borrow().clone();
        Ok(got)
    }

    /// The kernel's side: `xskq_prod_reserve`, `xskq_prod_submit`, `xskq_cons_peek_desc`, `__xskq_cons_release`.
    fn kernel(&self, world: &mut World, step: Step) -> Result<Option<u32>, String> {
        let memory = &mut world.memory;
        let cursors = &mut world.kernel;
        match step {
            Step::Put { items, age } => {
                let free = |cursors: &Cursors| self.size - cursors.next.wrapping_sub(cursors.seen);
                if free(cursors) < items {
                    // READ_ONCE, and the writes depend on it: as good as acquire here.
                    cursors.seen = memory.load(KERNEL, false, true, age);
                }
                if cursors.next.wrapping_sub(cursors.seen) > self.size {
                    return Err("the consumer is ahead of the producer".into());
                }
                if free(cursors) >= items {
                    for _ in 0..items {
                        memory.slot(KERNEL, cursors.next)?.content = world.written;
                        cursors.next = cursors.next.wrapping_add(1);
                        world.written += 1;
                    }
                }
                Ok(None)
            }
            Step::Publish => {
                memory.store(KERNEL, true, true, cursors.next);
                cursors.stored = cursors.next;
                Ok(None)
            }
            Step::Take { age } => {
                if cursors.next == cursors.seen {
                    cursors.seen = memory.load(KERNEL, true, true, age);
                }
                if cursors.seen.wrapping_sub(cursors.next) > self.size {
                    return Err("more is published than there are slots".into());
                }
                if cursors.next == cursors.seen {
                    return Ok(None);
                }
                let item = memory.slot(KERNEL, cursors.next)?.content;
                cursors.next = cursors.next.wrapping_add(1);
                Ok(Some(item))
            }
            Step::Release => {
                memory.store(KERNEL, false, true, cursors.next);
                cursors.stored = cursors.next;
                Ok(None)
            }
        }
    }
}

/// Every ring of up to `largest` slots, as either side, from the beginning and across the wrap of the counters.
fn all(mutation: Mutation, we: We, largest: u32) -> Result<usize, String> {
    let mut states = 0;
    for size in [1u32, 2, 4].into_iter().filter(|&size| size <= largest) {
        for start in [0, size.wrapping_neg(), 0u32.wrapping_sub(2 * size)] {
            states += Explorer { we, size, start, items: 2 * size + 2, mutation }.explore()?;
        }
    }
    Ok(states)
}

#[test]
fn no_interleaving_loses_doubles_or_tears_an_item() {
    let largest = if cfg!(miri) { 1 } else { 4 };
    for we in [We::Produce, We::Consume] {
        let states = all(Mutation::None, we, largest).unwrap();
        println!("{we:?}: {states} states");
        assert!(states > 50);
    }
}

#[test]
fn every_mutation_is_caught() {
    for (we, mutation) in [
        (We::Produce, Mutation::RelaxedStore),
        (We::Produce, Mutation::RelaxedLoad),
        (We::Produce, Mutation::OneTooMany),
        (We::Produce, Mutation::WrongSlotAfterWrap),
        (We::Produce, Mutation::OneTooFar),
        (We::Consume, Mutation::RelaxedStore),
        (We::Consume, Mutation::RelaxedLoad),
        (We::Consume, Mutation::WrongSlotAfterWrap),
        (We::Consume, Mutation::OneTooFar),
    ] {
        let caught = all(mutation, we, 2).unwrap_err();
        println!("{we:?} {mutation:?}: {caught}");
    }
}
