//! Single-producer single-consumer rings in memory shared with the kernel.
//!
//! Layout and memory order follow the kernel's `net/xdp/xsk_queue.h`: two free-running 32-bit counters, a
//! power-of-two array of slots. The producer publishes with a store-release of its counter after the slots
//! are written; the consumer reads the counter with a load-acquire before the slots.

use std::{
    marker::PhantomData,
    ptr::NonNull,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

/// Keeps the memory behind a ring alive: a mapping of the kernel's, or heap memory in tests.
pub(super) trait RingMemory: Send + Sync {}

/// Where the parts of one ring lie.
pub(super) struct RingParts<T> {
    pub producer: NonNull<AtomicU32>,
    pub consumer: NonNull<AtomicU32>,
    pub flags: Option<NonNull<AtomicU32>>,
    pub slots: NonNull<T>,
    /// Power of two.
    pub size: u32,
    #[expect(dead_code, reason = "keeps the mapping alive")]
    pub memory: Arc<dyn RingMemory>,
}

/// Access to a ring: the counters, with the order in which memory may be seen, and the slots. Real memory, or the
/// model that `model.rs` explores.
pub(super) trait Access<T> {
    /// Number of slots, a power of two.
    fn size(&self) -> u32;
    fn load_producer(&self, order: Ordering) -> u32;
    fn store_producer(&self, value: u32, order: Ordering);
    fn load_consumer(&self, order: Ordering) -> u32;
    fn store_consumer(&self, value: u32, order: Ordering);
    /// Writes the slot that `index`, a free-running counter, stands for.
    ///
    /// # Safety
    /// The slot is in the free part: the consumer does not touch it.
    unsafe fn write(&self, index: u32, item: T);
    /// Reads a slot.
    ///
    /// # Safety
    /// The slot is in the published part: the producer does not touch it.
    unsafe fn read(&self, index: u32) -> T;
    /// Flags of the kernel's, where it has any.
    fn flags(&self) -> Option<u32>;
}

/// A ring in memory shared with the kernel.
pub struct Shared<T> {
    parts: RingParts<T>,
}

// SAFETY: the counters are atomics, and each slot is accessed by one side at a time as the counters tell;
// the memory is kept alive by `parts.memory`.
unsafe impl<T: Copy + Send> Send for Shared<T> {}

impl<T: Copy> Shared<T> {
    fn producer(&self) -> &AtomicU32 {
        // SAFETY: points into `parts.memory`, alive as long as self.
        unsafe { self.parts.producer.as_ref() }
    }

    fn consumer(&self) -> &AtomicU32 {
        // SAFETY: as above.
        unsafe { self.parts.consumer.as_ref() }
    }

    fn slot(&self, index: u32) -> NonNull<T> {
        let masked = (index & (self.parts.size - 1)) as usize;
        // SAFETY: masked < size, and `slots` has `size` elements.
        unsafe { self.parts.slots.add(masked) }
    }
}

impl<T: Copy> Access<T> for Shared<T> {
    fn size(&self) -> u32 {
        self.parts.size
    }

    fn load_producer(&self, order: Ordering) -> u32 {
        self.producer().load(order)
    }

    fn store_producer(&self, value: u32, order: Ordering) {
        self.producer().store(value, order);
    }

    fn load_consumer(&self, order: Ordering) -> u32 {
        self.consumer().load(order)
    }

    fn store_consumer(&self, value: u32, order: Ordering) {
        self.consumer().store(value, order);
    }

    unsafe fn write(&self, index: u32, item: T) {
        // SAFETY: the slot is there, and nobody else's by the caller's promise.
        unsafe { self.slot(index).write(item) };
    }

    unsafe fn read(&self, index: u32) -> T {
        // SAFETY: as above.
        unsafe { self.slot(index).read() }
    }

    fn flags(&self) -> Option<u32> {
        // SAFETY: points into `parts.memory`, alive as long as self.
        self.parts.flags.map(|flags| unsafe { flags.as_ref() }.load(Ordering::Relaxed))
    }
}

/// The side that fills slots.
#[expect(private_bounds, reason = "only this module's memory, and the tests' model")]
pub struct Producer<T: Copy, A: Access<T> = Shared<T>> {
    ring: A,
    item: PhantomData<T>,
    /// Next slot to write; slots before it are staged or published.
    next: u32,
    /// The consumer's counter when it was last read.
    seen_consumer: u32,
}

impl<T: Copy> Producer<T> {
    pub(super) fn new(parts: RingParts<T>) -> Self {
        Self::over(Shared { parts })
    }
}

#[expect(private_bounds, reason = "as above")]
impl<T: Copy, A: Access<T>> Producer<T, A> {
    fn over(ring: A) -> Self {
        let next = ring.load_producer(Ordering::Relaxed);
        let seen_consumer = ring.load_consumer(Ordering::Acquire);
        Self { ring, item: PhantomData, next, seen_consumer }
    }

    /// Number of slots that can be written now. Reads the shared counter only when `wanted` are not known free.
    pub fn free(&mut self, wanted: u32) -> u32 {
        let known = self.ring.size() - self.next.wrapping_sub(self.seen_consumer);
        if known >= wanted {
            return known;
        }
        self.seen_consumer = self.ring.load_consumer(Ordering::Acquire);
        self.ring.size() - self.next.wrapping_sub(self.seen_consumer)
    }

    /// Writes all of `items` or nothing; the other side sees them at the next [`publish`](Self::publish).
    /// Returns whether they were written.
    #[must_use]
    pub fn stage(&mut self, items: impl ExactSizeIterator<Item = T>) -> bool {
        let count = items.len() as u32;
        if self.free(count) < count {
            return false;
        }
        for item in items.take(count as usize) {
            // SAFETY: the slot lies in the free part, which the consumer does not touch.
            unsafe { self.ring.write(self.next, item) };
            self.next = self.next.wrapping_add(1);
        }
        true
    }

    /// Shows all staged slots to the other side.
    pub fn publish(&mut self) {
        self.ring.store_producer(self.next, Ordering::Release);
    }

    /// Slots published or staged that the other side has not taken yet.
    pub fn pending(&mut self) -> u32 {
        self.ring.size() - self.free(self.ring.size())
    }

    /// Whether the kernel sleeps and must be woken by a system call (`XDP_RING_NEED_WAKEUP`).
    pub fn needs_wakeup(&self) -> bool {
        let asks = |flags| flags & rustix::net::xdp::XdpRingFlags::XDP_RING_NEED_WAKEUP.bits() != 0;
        self.ring.flags().is_none_or(asks)
    }
}

/// The side that empties slots.
#[expect(private_bounds, reason = "only this module's memory, and the tests' model")]
pub struct Consumer<T: Copy, A: Access<T> = Shared<T>> {
    ring: A,
    item: PhantomData<T>,
    next: u32,
    /// The producer's counter when it was last read.
    seen_producer: u32,
}

impl<T: Copy> Consumer<T> {
    pub(super) fn new(parts: RingParts<T>) -> Self {
        Self::over(Shared { parts })
    }
}

#[expect(private_bounds, reason = "as above")]
impl<T: Copy, A: Access<T>> Consumer<T, A> {
    fn over(ring: A) -> Self {
        let next = ring.load_consumer(Ordering::Relaxed);
        let seen_producer = ring.load_producer(Ordering::Acquire);
        Self { ring, item: PhantomData, next, seen_producer }
    }

    /// Takes the oldest slot, if any; the producer may reuse it after the next [`release`](Self::release).
    pub fn take(&mut self) -> Option<T> {
        if self.next == self.seen_producer {
            self.seen_producer = self.ring.load_producer(Ordering::Acquire);
            if self.next == self.seen_producer {
                return None;
            }
        }
        // SAFETY: the slot lies in the published part, which the producer does not touch until released.
        let item = unsafe { self.ring.read(self.next) };
        self.next = self.next.wrapping_add(1);
        Some(item)
    }

    /// Gives all taken slots back to the producer.
    pub fn release(&mut self) {
        self.ring.store_consumer(self.next, Ordering::Release);
    }
}

struct HeapRing<T> {
    producer: AtomicU32,
    consumer: AtomicU32,
    slots: Box<[std::cell::UnsafeCell<T>]>,
}

// SAFETY: slots are accessed by one side at a time as the counters tell.
unsafe impl<T: Send> Send for HeapRing<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for HeapRing<T> {}
impl<T: Send> RingMemory for HeapRing<T> {}

/// A ring in ordinary memory, its slots holding `initial`: the tests' kernel.
///
/// # Panics
/// When `size` is not a power of two.
pub fn ring_pair<T: Copy + Send + 'static>(size: u32, initial: T) -> (Producer<T>, Consumer<T>) {
    assert!(size.is_power_of_two(), "ring sizes are powers of two");
    let memory = Arc::new(HeapRing {
        producer: AtomicU32::new(0),
        consumer: AtomicU32::new(0),
        slots: (0..size).map(|_| initial.into()).collect(),
    });
    let parts = || RingParts {
        producer: NonNull::from(&memory.producer),
        consumer: NonNull::from(&memory.consumer),
        flags: None,
        // UnsafeCell<T> has the layout of T.
        slots: NonNull::from(&*memory.slots).cast::<T>(),
        size,
        memory: Arc::clone(&memory) as Arc<dyn RingMemory>,
    };
    (Producer::new(parts()), Consumer::new(parts()))
}

#[cfg(test)]
mod model;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    #[test]
    fn staging_is_all_or_nothing() {
        let (mut producer, mut consumer) = ring_pair(4, 0u64);
        assert!(producer.stage([1, 2, 3].into_iter()));
        assert!(!producer.stage([4, 5].into_iter()));
        assert_eq!(consumer.take(), None, "staged slots are not visible");
        producer.publish();
        assert_eq!(consumer.take(), Some(1));
        assert!(!producer.stage([4, 5].into_iter()), "taken slots stay reserved until released");
        consumer.release();
        assert!(producer.stage([4, 5].into_iter()));
    }

    #[test]
    fn counters_wrap() {
        let (mut producer, mut consumer) = ring_pair(2, 0u64);
        for value in 0..10_000 {
            assert!(producer.stage([value].into_iter()));
            producer.publish();
            assert_eq!(consumer.take(), Some(value));
            consumer.release();
        }
    }

    #[test]
    fn two_threads_see_every_item_in_order() {
        let (mut producer, mut consumer) = ring_pair(8, 0u64);
        let total = if cfg!(miri) { 200 } else { 200_000 };
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let mut next = 0;
                while next < total {
                    let batch = (total - next).min(3);
                    if producer.stage((next..next + batch).collect::<Vec<_>>().into_iter()) {
                        producer.publish();
                        next += batch;
                    } else {
                        std::thread::yield_now();
                    }
                }
            });
            let mut expected = 0;
            while expected < total {
                match consumer.take() {
                    Some(item) => {
                        assert_eq!(item, expected);
                        expected += 1;
                        consumer.release();
                    }
                    None => std::thread::yield_now(),
                }
            }
        });
    }

    proptest! {
        /// Any interleaving of operations behaves like a bounded queue.
        #[test]
        fn behaves_like_a_bounded_queue(operations in proptest::collection::vec((0u8..4, 1usize..6), 0..200)) {
            let (mut producer, mut consumer) = ring_pair(8, 0u64);
            let (mut staged, mut published, mut taken) = (VecDeque::new(), VecDeque::new(), 0usize);
            let mut counter = 0u64;
            for (operation, count) in operations {
                match operation {
                    0 => {
                        let items: Vec<u64> = (counter..counter + count as u64).collect();
                        let fits = staged.len() + published.len() + taken + count <= 8;
                        prop_assert_eq!(producer.stage(items.iter().copied()), fits);
                        if fits { staged.extend(items); counter += count as u64; }
                    }
                    1 => { producer.publish(); published.append(&mut staged); }
                    2 => {
                        let expected = published.pop_front();
                        prop_assert_eq!(consumer.take(), expected);
                        taken += usize::from(expected.is_some());
                    }
                    _ => { consumer.release(); taken = 0; }
                }
            }
        }
    }
}
