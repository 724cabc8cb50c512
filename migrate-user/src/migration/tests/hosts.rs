//! Both hosts as the world has them.

use super::*;

pub(super) struct Source(pub(super) Shared);
pub(super) struct Destination(Shared);
pub(super) struct Memory(pub(super) Shared);
pub(super) struct Host(pub(super) Shared);
pub(super) struct Stream(Shared);

impl SourceVm for Source {
    async fn pause(&mut self) -> Result<(), VmmError> {
        let mut world = self.0.lock().unwrap();
        if world.fails(Call::Pause) {
            return Err(failure("pause"));
        }
        world.source_runs = false;
        Ok(())
    }
    async fn unpause(&mut self) -> Result<(), VmmError> {
        self.resume().await
    }
    async fn throttle(&mut self, percent: u8) -> Result<&'static str, VmmError> {
        let mut world = self.0.lock().unwrap();
        // What failed half-way is half done.
        world.throttles.push(percent);
        if world.fails(Call::Throttle) { Err(failure("throttle")) } else { Ok("memory") }
    }
    async fn unthrottle(&mut self) -> Result<(), VmmError> {
        self.0.lock().unwrap().throttles.push(0);
        Ok(())
    }
    async fn stop(&mut self) -> Result<Instant, VmmError> {
        let mut world = self.0.lock().unwrap();
        assert_eq!(world.throttle(), 0, "vCPUs that rest would be waited for");
        world.guest_writes();
        world.source_runs = false;
        // It may have stopped and yet not have got where it should.
        if world.fails(Call::Stop) { Err(failure("stop")) } else { Ok(Instant::now()) }
    }
    async fn release_state(&mut self) -> Result<(), VmmError> {
        if self.0.lock().unwrap().fails(Call::Release) { Err(failure("release")) } else { Ok(()) }
    }
    async fn state(&mut self) -> Result<Option<Bytes>, VmmError> {
        let mut world = self.0.lock().unwrap();
        if world.fails(Call::State) {
            return Err(failure("state"));
        }
        let parts = world.calls.iter().filter(|&&call| call == Call::State).count();
        Ok((parts <= 3).then(|| Bytes::from_static(b"devices")))
    }
    async fn resume(&mut self) -> Result<(), VmmError> {
        let mut world = self.0.lock().unwrap();
        assert!(!world.source_gone, "a VMM that was ended cannot resume");
        if world.fails(Call::Resume) {
            return Err(failure("resume"));
        }
        world.source_runs = true;
        world.check();
        Ok(())
    }
    async fn quit(&mut self) -> Result<(), VmmError> {
        let mut world = self.0.lock().unwrap();
        let theirs = world.destination_runs || world.fault.died_running;
        assert!(!world.source_runs && theirs, "only a VM that is elsewhere is ended here");
        world.source_gone = true;
        if world.fails(Call::Quit) { Err(failure("quit")) } else { Ok(()) }
    }
}

impl DestinationVm for Destination {
    async fn load(&mut self, _: Bytes) -> Result<(), VmmError> {
        if self.0.lock().unwrap().fails(Call::Load) { Err(failure("load")) } else { Ok(()) }
    }
    async fn finish(&mut self) -> Result<(), VmmError> {
        if self.0.lock().unwrap().fails(Call::Finish) { Err(failure("finish")) } else { Ok(()) }
    }
    async fn run(&mut self) -> Result<(), VmmError> {
        let mut world = self.0.lock().unwrap();
        if world.fails(Call::Run) {
            return Err(failure("run"));
        }
        assert_eq!(world.destination_journal.verdict, Some(Verdict::Accepted), "written down before it runs");
        assert_eq!(world.source_memory, world.destination_memory, "memory is whole before it runs");
        world.destination_runs = true;
        world.check();
        Ok(())
    }
    async fn ended(&mut self) -> VmmError {
        std::future::pending().await
    }
    async fn destroy(&mut self) -> Option<Destroyed> {
        let mut world = self.0.lock().unwrap();
        assert!(!world.destination_runs, "a running VM is never destroyed");
        let before = world.calls.iter().filter(|&&call| call == Call::Destroy).count();
        if world.fails(Call::Destroy) || before < world.fault.destroy_fails {
            return None;
        }
        world.destination_exists = false;
        Some(if world.fault.died_running { Destroyed::MayHaveRun } else { Destroyed::NeverRan })
    }
}

fn digest(memory: &[u32; PAGES]) -> Digest {
    Digest(
        memory.iter().fold(7u128, |sum, &page| sum.wrapping_mul(31).wrapping_add(page.into())).to_le_bytes(),
    )
}

fn no_tracking() -> MemoryError {
    MemoryError::Inject { pid: 1, problem: "made to fail".into() }
}

impl SourceMemory for Memory {
    async fn begin(&mut self) -> Result<PageSet, MemoryError> {
        let mut world = self.0.lock().unwrap();
        if world.fails(Call::Begin) {
            return Err(no_tracking());
        }
        world.tracked = true;
        let mut all = PageSet::new(PAGES as u64);
        all.insert_range(0, PAGES as u64);
        Ok(all)
    }
    async fn take_written(&mut self) -> Result<PageSet, MemoryError> {
        let mut world = self.0.lock().unwrap();
        if world.fails(Call::TakeWritten) {
            return Err(no_tracking());
        }
        world.guest_writes();
        Ok(std::mem::replace(&mut world.dirty, PageSet::new(PAGES as u64)))
    }
    async fn digest(&mut self) -> Result<Digest, MemoryError> {
        Ok(digest(&self.0.lock().unwrap().source_memory))
    }
    fn discard(&mut self) -> Result<(), MemoryError> {
        let world = self.0.lock().unwrap();
        assert!(
            world.source_gone && (world.destination_runs || world.fault.died_running),
            "memory is freed only when nobody here needs it"
        );
        Ok(())
    }
    fn release(&mut self) {
        self.0.lock().unwrap().tracked = false;
    }
}

impl SourceHost for Host {
    type Stream = Stream;
    async fn record(&mut self, record: SourceRecord) -> Result<(), MigrationError> {
        let mut world = self.0.lock().unwrap();
        let (call, change) = match record {
            SourceRecord::Offer => (Some(Call::Offer), Change::Offered),
            SourceRecord::Commit => (Some(Call::Commit), Change::Committed),
            SourceRecord::End(verdict) => (None, Change::Concluded(Some(verdict))),
        };
        if call.is_some_and(|call| world.fails(call)) {
            return Err(MigrationError::Host("the journal is full".into()));
        }
        world.source_journal.apply(change);
        Ok(())
    }
    async fn ask(&mut self) -> Option<Verdict> {
        for _ in 0..10 {
            // The destination may be on its way between accepting and running, or may not have noticed the break yet.
            tokio::task::yield_now().await;
            let mut world = self.0.lock().unwrap();
            if world.fault.cut_off {
                return None;
            }
            match world.destination_journal.asked_by_source() {
                Some(Answer::Stands(verdict)) => return Some(verdict),
                Some(Answer::Decide(verdict)) => {
                    world.destination_journal.apply(Change::Decided(verdict));
                    return Some(verdict);
                }
                None => {}
            }
        }
        None
    }
    async fn open_stream(&mut self, _: &Prepared) -> Result<Stream, MigrationError> {
        if self.0.lock().unwrap().fails(Call::OpenStream) {
            return Err(MigrationError::Host("open_stream was made to fail".into()));
        }
        Ok(Stream(Arc::clone(&self.0)))
    }
}

impl PageStream for Stream {
    async fn probe(&mut self, _: u32) -> Result<(), MigrationError> {
        Ok(())
    }
    /// One page a frame.
    async fn send(&mut self, _: u32, pages: Arc<PageSet>, _: bool) -> Result<RoundSent, MigrationError> {
        if self.0.lock().unwrap().fault.flat_out {
            // 640 pages a second, so that all of them take 100 ms.
            let time = Duration::from_micros(1562) * pages.count() as u32;
            tokio::time::sleep(time).await;
            self.0.lock().unwrap().guest_writes_for(time);
        }
        let mut world = self.0.lock().unwrap();
        if world.fails(Call::Send) {
            return Err(MigrationError::Send(crate::datapath::SendError::Silent));
        }
        for (number, page) in pages.iter().enumerate() {
            world.frames += 1;
            if world.fault.lose_every.is_some_and(|every| world.frames.is_multiple_of(every)) {
                continue;
            }
            world.destination_memory[page as usize] = world.source_memory[page as usize];
            world.received.insert(number as u32);
        }
        world.guest_writes();
        Ok(RoundSent {
            frames: vec![pages.count() as u32],
            data_pages: pages.count(),
            ..RoundSent::default()
        })
    }
    fn left(&mut self, pages: &PageSet, losses: &[LaneLosses]) -> PageSet {
        let numbers: Vec<u64> = pages.iter().collect();
        let mut again = PageSet::new(PAGES as u64);
        for (start, end) in losses.iter().flat_map(|lane| lane.missing.clone()) {
            (start..end).for_each(|number| again.insert(numbers[number as usize]));
        }
        again
    }
}

impl DestinationHost for Host {
    type Vm = Destination;
    fn greeted(&mut self, _: &str) -> Result<(), MigrationError> {
        Ok(())
    }
    fn admit(&mut self, _: &Prepare) -> Vec<Finding> {
        self.0.lock().unwrap().unadmitted.clone()
    }
    async fn record(&mut self, record: DestinationRecord) -> Result<Recorded, MigrationError> {
        let mut world = self.0.lock().unwrap();
        let full = || MigrationError::Host("the journal is full".into());
        match record {
            DestinationRecord::Waiting => {
                if world.fails(Call::Wait) {
                    return Err(full());
                }
                world.destination_journal.apply(Change::Waiting);
            }
            DestinationRecord::Accepted => {
                if world.fails(Call::Accept) {
                    return Err(full());
                }
                if let Some(before) = world.destination_journal.decide(Verdict::Accepted) {
                    return Ok(before);
                }
                world.destination_journal.apply(Change::Decided(Verdict::Accepted));
            }
            DestinationRecord::Refused => {
                assert!(!world.destination_exists, "refused only when nothing is left here");
                world.destination_journal.apply(Change::Decided(Verdict::Refused));
            }
            DestinationRecord::End(verdict) => {
                world.destination_journal.apply(Change::Concluded(Some(verdict)));
            }
        }
        Ok(Recorded::Written)
    }
    async fn prepare(
        &mut self,
        request: &Prepare,
    ) -> Result<Preparation<Destination>, Unprepared<Destination>> {
        let mut world = self.0.lock().unwrap();
        if world.fails(Call::Prepare) {
            return Err(MigrationError::Host("there is no room".into()).into());
        }
        let mut findings = world.findings.clone();
        preflight::settle(&mut findings, request.force);
        let goes = !request.check_only && preflight::outcome(&findings) == preflight::Outcome::CanGo;
        world.destination_exists = true;
        let vm = Some(Destination(Arc::clone(&self.0)));
        Ok(Preparation { findings, prepared: goes.then(prepared), vm })
    }
    fn hear_probes(&mut self, _: &Prepare, _: &mut Vec<Finding>) -> Option<Prepared> {
        Some(prepared())
    }
    async fn probes(&mut self, sent: u32) -> u64 {
        if self.0.lock().unwrap().no_path { 0 } else { sent.into() }
    }
    async fn close_round(
        &mut self,
        _: u32,
        frames: &[u32],
        _: bool,
        _: Duration,
    ) -> Result<Vec<LaneLosses>, MigrationError> {
        let mut world = self.0.lock().unwrap();
        if world.fails(Call::CloseRound) {
            return Err(MigrationError::Host("close_round was made to fail".into()));
        }
        Ok(losses(frames, &[std::mem::take(&mut world.received)]))
    }
    fn figures(&self) -> Vec<QueueFigures> {
        vec![QueueFigures { frames: self.0.lock().unwrap().frames as u64, ..QueueFigures::default() }]
    }
    async fn refresh_hashes(&mut self) -> Result<(), MigrationError> {
        // The source has its turn meanwhile, if it has been given the word.
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
        let fails = self.0.lock().unwrap().fails(Call::RefreshHashes);
        if fails { Err(MigrationError::Host("refresh_hashes was made to fail".into())) } else { Ok(()) }
    }
    async fn digest(&mut self) -> Result<Digest, MigrationError> {
        Ok(digest(&self.0.lock().unwrap().destination_memory))
    }
    fn progress(&self) -> u64 {
        self.0.lock().unwrap().frames as u64
    }
    async fn settle(&mut self, _: u64) -> Result<Verdict, MigrationError> {
        unreachable!("the source asks the journal")
    }
    async fn claim(&mut self, _: u64, _: bool) -> Result<Verdict, MigrationError> {
        unreachable!("nobody dies here")
    }
    fn give_back(&mut self) {
        let world = self.0.lock().unwrap();
        assert!(!world.destination_exists, "memory is given back when nobody uses it");
    }
    async fn close_stream(&mut self) {}
    fn announce(&mut self) -> (u32, u32) {
        assert!(self.0.lock().unwrap().destination_runs, "nothing is announced before the VM runs");
        (1, 5)
    }
    fn keep(&mut self, _: Destination) {}
}
