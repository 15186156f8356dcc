//! The nearest entries of each entry, and bounds of all the others: what [`search`](super::search)
//! goes by.

use crate::kernel;
use crate::kernel::buffer::Buffer;
use crate::memory::merged::recent::Recent;
use crate::memory::merged::row::{Found, Row, STRIP};
use crate::scalar::Scalar;

/// As many are known of each entry.
const NEAREST: usize = 8;

/// A name is the number of a handle, and how often its bearer has changed.
const HANDLE: u64 = (1 << 20) - 1;

/// Another entry as it was when it was measured, and `1/distance²` to it.
#[derive(Clone, Copy, Debug, Default)]
struct Link<T> {
    name: u64,
    closeness: T,
}

/// The links of an entry, in no order. Those to entries that have changed since lead nowhere.
#[derive(Clone, Copy, Debug, Default)]
struct Links<T> {
    links: [Link<T>; NEAREST],
    len: usize,
}

impl<T: Scalar> Links<T> {
    /// Adds a link; the one of least closeness if there is no room for all.
    fn insert(&mut self, mut link: Link<T>) -> Option<Link<T>> {
        if self.len < NEAREST {
            self.links[self.len] = link;
            self.len += 1;
            return None;
        }
        for old in &mut self.links {
            if old.closeness < link.closeness {
                core::mem::swap(old, &mut link);
            }
        }
        Some(link)
    }
}

/// See [`search`](super::search). All columns of entries, whole vectors of them.
#[derive(Clone, Debug)]
pub(super) struct Neighbours<T> {
    links: Vec<Links<T>>,
    /// No closeness to a linked entry is larger, and none to another that has settled. Pairs with
    /// recent entries are in the rows of these, of which nothing else is known; their limit is
    /// infinite, so that they are told of none.
    near: Buffer<T>,
    limit: Buffer<T>,
    /// No affinity with a linked entry is larger, and none with another that has settled.
    linked: Buffer<T>,
    others: Buffer<T>,
    /// The names of the entries, and where the entry with a handle is.
    names: Vec<u64>,
    places: Vec<usize>,
    /// The entry of which nothing is known, beside the newest.
    pub(super) changed: Option<usize>,
    /// Those that have changed last are not linked with any, and are told of none.
    pub(super) recent: Recent<T>,
    /// Scratch: bounds of affinities with entries that are not lighter.
    reach: Buffer<T>,
}

impl<T: Scalar> Neighbours<T> {
    pub(super) fn new() -> Self {
        Self {
            links: Vec::new(),
            near: Buffer::new(),
            limit: Buffer::new(),
            linked: Buffer::new(),
            others: Buffer::new(),
            names: Vec::new(),
            places: Vec::new(),
            changed: None,
            recent: Recent::new(),
            reach: Buffer::new(),
        }
    }

    fn columns(&mut self) -> [&mut Buffer<T>; 4] {
        [&mut self.near, &mut self.limit, &mut self.linked, &mut self.others]
    }

    /// Makes room for so many entries; what is known of those there are stays.
    pub(super) fn make_room(&mut self, capacity: usize) {
        for column in self.columns() {
            column.grow(capacity.max(column.len()));
        }
        self.recent.make_room(capacity);
        self.reach.resize(capacity);
        let none = Links { links: [Link { name: 0, closeness: T::zero() }; NEAREST], len: 0 };
        self.links.resize(capacity.max(self.links.len()), none);
        for place in self.names.len()..capacity {
            self.names.push(place as u64);
            self.places.push(place);
        }
    }

    /// Nothing is known any more.
    pub(super) fn clear(&mut self) {
        self.columns().into_iter().for_each(|column| column.fill(T::zero()));
        self.links.iter_mut().for_each(|links| links.len = 0);
        self.recent.clear();
        self.changed = None;
    }

    pub(super) fn copy_from(&mut self, other: &Self) {
        self.links.clone_from(&other.links);
        let columns = [&other.near, &other.limit, &other.linked, &other.others];
        for (to, from) in self.columns().into_iter().zip(columns) {
            to.resize(from.len());
            to.copy_from_slice(from);
        }
        self.names.clone_from(&other.names);
        self.places.clone_from(&other.places);
        self.changed = other.changed;
        self.recent.copy_from(&other.recent);
        self.reach.resize(other.reach.len());
    }

    /// Nothing is known of an entry, and it is told of none.
    pub(super) fn forget(&mut self, entry: usize) {
        self.recent.forget(entry);
        self.names[entry] += HANDLE + 1; // nobody knows it any more
        self.links[entry].len = 0;
        for column in self.columns() {
            column[entry] = T::zero();
        }
        self.limit[entry] = T::infinity();
    }

    /// An entry has changed, the first since all were measured.
    pub(super) fn change(&mut self, entry: usize) {
        debug_assert!(self.changed.is_none());
        self.changed = Some(entry);
    }

    /// The last entry takes the place of another.
    pub(super) fn move_entry(&mut self, from: usize, to: usize) {
        self.links[to] = self.links[from];
        for column in self.columns() {
            column[to] = column[from];
        }
        self.recent.move_entry(from, to);
        self.names.swap(from, to);
        for place in [from, to] {
            self.places[(self.names[place] & HANDLE) as usize] = place;
        }
    }

    /// Entries from `len` to `old` are gone.
    pub(super) fn truncate(&mut self, len: usize, old: usize) {
        for entry in len..old {
            self.forget(entry);
            self.limit[entry] = T::zero();
        }
    }

    /// No affinity has grown by more than 1/`decay`.
    pub(super) fn grow(&mut self, used: usize, decay: T) {
        // what rounding adds to weights, their inverses and affinities
        let factor = (T::one() + T::epsilon() * T::from_f64(32.0)) / decay;
        kernel::scale(&mut self.linked[..used], factor);
        kernel::scale(&mut self.others[..used], factor);
    }

    /// Links an entry with another that is nearer than all that are not linked; if there is no room
    /// the farthest of them is linked no more.
    fn link(&mut self, entry: usize, other: usize, closeness: T, reciprocal: &[T]) {
        let name = self.names[other];
        let Self { links, names, places, near, limit, linked, others, .. } = self;
        let place = |link: &Link<T>| places[(link.name & HANDLE) as usize];
        let affinity =
            |link: &Link<T>| (reciprocal[entry] + reciprocal[place(link)]) * link.closeness;
        let new = Link { name, closeness };
        let links = &mut links[entry];
        let mut old = links.links[..links.len].iter_mut();
        if let Some(free) = old.find(|link| names[place(link)] != link.name) {
            *free = new;
        } else if let Some(leaves) = links.insert(new) {
            limit[entry] = limit[entry].max(leaves.closeness);
            others[entry] = others[entry].max(affinity(&leaves));
        }
        near[entry] = near[entry].max(closeness);
        linked[entry] = linked[entry].max(affinity(&new));
    }

    /// Links an entry with those nearest to it.
    pub(super) fn find_nearest(&mut self, row: Row<'_, T>) {
        let Row { entry, reciprocal, closeness } = row;
        let links = &mut self.links[entry];
        links.len = 0;
        let mut limit = T::zero();
        for (strip, closeness) in closeness.chunks(STRIP).enumerate() {
            if kernel::max(closeness) <= limit {
                continue;
            }
            let others = self.names.iter().zip(&*self.limit).skip(strip * STRIP);
            for (&closeness, (&name, of_other)) in closeness.iter().zip(others) {
                // what has changed of late makes itself known later
                if closeness > limit && of_other.is_finite() {
                    let leaves = links.insert(Link { name, closeness });
                    limit = leaves.map_or(limit, |link| limit.max(link.closeness));
                }
            }
        }
        self.limit[entry] = limit;
        self.others[entry] = row.largest(limit);
        self.best_linked(entry, reciprocal, |best| best);
    }

    /// Tells the others of an entry.
    #[allow(clippy::needless_bitwise_bool)] // vectors have no lazy operators
    fn introduce(&mut self, row: Row<'_, T>) {
        let Row { entry, reciprocal, closeness } = row;
        let used = closeness.len();
        let (limit, others) = (&self.limit[..used], &mut self.others[..used]);
        kernel::share_affinities(reciprocal[entry], reciprocal, closeness, limit, others);
        for start in (0..used).step_by(STRIP) {
            let strip = start..used.min(start + STRIP);
            let pairs = closeness[strip.clone()].iter().zip(&self.limit[strip.clone()]);
            if !pairs.fold(false, |any, (closeness, limit)| any | (closeness > limit)) {
                continue;
            }
            for other in strip {
                if closeness[other] > self.limit[other] {
                    self.link(other, entry, closeness[other], reciprocal);
                }
            }
        }
    }

    /// Takes an entry in that has been measured.
    pub(super) fn add(&mut self, row: Row<'_, T>) {
        if let Some(oldest) = self.recent.oldest() {
            let recent = core::mem::replace(&mut self.recent, Recent::new());
            let settled = recent.row(0, row.reciprocal);
            self.find_nearest(settled);
            self.introduce(settled);
            self.recent = recent;
            self.recent.leave(oldest);
        }
        self.recent.add(row);
    }

    /// Bounds of affinities with linked entries that are not lighter, or with others. Entries
    /// beyond those there are have none.
    pub(super) fn reach(&mut self, reciprocal: &[T], linked: bool) -> &[T] {
        let Self { near, limit, linked: of_linked, others, reach, .. } = self;
        let (closeness, affinity) = if linked { (near, of_linked) } else { (limit, others) };
        let reach = &mut reach[..reciprocal.len()];
        kernel::reach(reciprocal, closeness, affinity, reach);
        // their rows say more than bounds would
        for recent in self.recent.entries() {
            reach[recent] = T::neg_infinity();
        }
        reach
    }

    /// The next entry from `start` on that reaches as far.
    #[allow(clippy::needless_bitwise_bool)]
    pub(super) fn next(&self, start: usize, used: usize, enough: T) -> Option<usize> {
        let mut from = start;
        while from < used {
            let to = used.min((from / STRIP + 1) * STRIP);
            let strip = &self.reach[from..to];
            if strip.iter().fold(false, |any, &reach| any | (reach >= enough)) {
                let found = strip.iter().position(|&reach| reach >= enough)?;
                return Some(from + found);
            }
            from = to;
        }
        None
    }

    /// The pair of largest affinity of an entry and those linked; of equal ones the lowest other.
    pub(super) fn best_linked(
        &mut self,
        entry: usize,
        reciprocal: &[T],
        tied: impl Fn(T) -> T,
    ) -> Option<Found<T>> {
        let links = &mut self.links[entry];
        let (mut kept, mut near, mut best) = (0, T::zero(), None::<Found<T>>);
        for old in 0..links.len {
            let link = links.links[old];
            let place = self.places[(link.name & HANDLE) as usize];
            if self.names[place] != link.name {
                continue; // it has changed, or is no more
            }
            links.links[kept] = link;
            kept += 1;
            near = near.max(link.closeness);
            let affinity = (reciprocal[entry] + reciprocal[place]) * link.closeness;
            best = Found::better(best, Some(Found::new(affinity, entry, place)), &tied);
        }
        links.len = kept;
        self.near[entry] = near;
        self.linked[entry] = best.map_or(T::zero(), |best| best.affinity);
        best
    }
}
