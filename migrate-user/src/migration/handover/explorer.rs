//! Visits every state that a model can reach.

use std::{collections::HashMap, fmt::Debug, hash::Hash};

/// Something that moves from state to state.
pub trait Model {
    /// One state.
    type State: Copy + Eq + Hash + Debug;
    /// Where it begins.
    fn initial(&self) -> Self::State;
    /// All moves from `state`. Ones that only a fault makes are marked: they may happen, but nothing may depend on them.
    fn moves(&self, state: &Self::State, moves: &mut Vec<Move<Self::State>>);
    /// What is wrong with a state, if anything.
    fn violation(&self, state: &Self::State) -> Option<&'static str>;
    /// Whether everything has come to the end that it should.
    fn settled(&self, state: &Self::State) -> bool;
}

/// One move.
pub struct Move<S> {
    /// What happens, for people.
    pub name: &'static str,
    /// Whether it is a fault.
    pub fault: bool,
    /// The state after it.
    pub to: S,
}

/// What an exploration found.
#[derive(Debug)]
pub struct Explored {
    /// Different states.
    pub states: usize,
    /// Moves between them.
    pub moves: usize,
    /// Ones in which everything is settled.
    pub settled: usize,
}

/// Visits every reachable state. Each must be sound, and from each a settled one must be reachable without a further
/// fault.
///
/// # Errors
/// The shortest way to a state that is not so.
pub fn explore<M: Model>(model: &M) -> Result<Explored, String> {
    let mut numbers: HashMap<M::State, u32> = HashMap::new();
    let mut states = vec![model.initial()];
    let mut came_from: Vec<(u32, &'static str)> = vec![(0, "")];
    // Backwards, and without faults: who leads here.
    let mut edges: Vec<(u32, u32)> = Vec::new();
    let mut moves = Vec::new();
    let mut count = 0;
    numbers.insert(states[0], 0);
    let mut next = 0;
    while next < states.len() {
        let state = states[next];
        if let Some(problem) = model.violation(&state) {
            return Err(story(problem, next, &states, &came_from));
        }
        moves.clear();
        model.moves(&state, &mut moves);
        count += moves.len();
        for Move { name, fault, to } in moves.drain(..) {
            let number = *numbers.entry(to).or_insert_with(|| {
                states.push(to);
                came_from.push((next as u32, name));
                states.len() as u32 - 1
            });
            if !fault {
                edges.push((number, next as u32));
            }
        }
        next += 1;
    }
    drop(numbers);
    edges.sort_unstable();
    let mut hopeful: Vec<bool> = states.iter().map(|state| model.settled(state)).collect();
    let settled = hopeful.iter().filter(|&&settled| settled).count();
    let mut todo: Vec<u32> = (0..states.len() as u32).filter(|&number| hopeful[number as usize]).collect();
    while let Some(number) = todo.pop() {
        let first = edges.partition_point(|&(to, _)| to < number);
        for &(_, from) in edges[first..].iter().take_while(|&&(to, _)| to == number) {
            if !std::mem::replace(&mut hopeful[from as usize], true) {
                todo.push(from);
            }
        }
    }
    match hopeful.iter().position(|&hopeful| !hopeful) {
        Some(stuck) => Err(story("nothing settles this any more", stuck, &states, &came_from)),
        None => Ok(Explored { states: states.len(), moves: count, settled }),
    }
}

fn story<S: Debug>(problem: &str, end: usize, states: &[S], came_from: &[(u32, &'static str)]) -> String {
    let mut names = Vec::new();
    let mut at = end;
    while at != 0 {
        let (before, name) = came_from[at];
        names.push(name);
        at = before as usize;
    }
    names.reverse();
    format!("{problem}, after: {}\n{:?}", names.join(" → "), states[end])
}
