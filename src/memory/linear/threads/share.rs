//! How items of work go to the threads there are.

use std::collections::VecDeque;
use std::sync::Mutex;

/// Runs `run` on every item with its index, in the memory of the thread it runs on; the results in
/// order.
///
/// Every thread begins with the same share of neighbours each time, so that what one step of a
/// block left in the caches of a core is there for the next; who is done takes from the end of
/// another's share, so that nobody waits for long.
pub(super) fn share<M: Send, I: Send, R: Send>(
    memories: &mut [M],
    items: impl IntoIterator<Item = I>,
    run: impl Fn(&mut M, usize, I) -> R + Sync,
) -> Vec<R> {
    let mut items: VecDeque<(usize, I)> = items.into_iter().enumerate().collect();
    let count = items.len();
    let size = count.div_ceil(memories.len()).max(1);
    let mut threads = Vec::with_capacity(memories.len());
    let mut shares = Vec::with_capacity(memories.len());
    for memory in memories {
        let rest = items.split_off(size.min(items.len()));
        threads.push(Mutex::new((memory, Vec::with_capacity(size))));
        shares.push(Mutex::new(items));
        items = rest;
    }
    let next = |thread: usize| {
        let own = shares[thread].lock().ok()?.pop_front();
        own.or_else(|| {
            (1..shares.len())
                .find_map(|i| shares[(thread + i) % shares.len()].lock().ok()?.pop_back())
        })
    };
    rayon::broadcast(|thread| {
        if let Some(mut own) = threads.get(thread.index()).and_then(|own| own.lock().ok()) {
            let (memory, results) = &mut *own;
            while let Some((i, item)) = next(thread.index()) {
                results.push((i, run(memory, i, item)));
            }
        }
    });
    let mut results: Vec<(usize, R)> = Vec::with_capacity(count);
    results.extend(
        threads
            .into_iter()
            .filter_map(|thread| thread.into_inner().ok())
            .flat_map(|(_, results)| results),
    );
    results.sort_unstable_by_key(|(i, _)| *i);
    results.into_iter().map(|(_, result)| result).collect()
}
