#![doc = include_str!("guide/links.md")]
#![doc = include_str!("../docs/guide.md")]
// One module for each page of `docs/guide`. The links of a page have labels, which the page defines
// as files, for whoever reads it there; `links.md` defines them as items, and comes first, since
// the first definition counts. (Its name is therefore that of the doc tests.)

macro_rules! pages {
    ($($name:ident,)*) => { $(
        #[doc = include_str!("guide/links.md")]
        #[doc = include_str!(concat!("../docs/guide/", stringify!($name), ".md"))]
        pub mod $name {}
    )* };
}

pages! {
    start,
    conventions,
    choosing,
    decoding,
    layers,
    families,
    decay,
    hybrids,
    exact_heads,
    plans,
    formats,
    weights,
    training,
    frameworks,
    speed,
    machines,
    own_map,
    own_kernel,
    own_memory,
    measuring,
    errors,
}

#[doc = include_str!("guide/links.md")]
// its program needs the feature, so it is a test with the feature only
#[cfg_attr(any(feature = "serde", not(doctest)), doc = include_str!("../docs/guide/saving.md"))]
pub mod saving {}

#[doc = include_str!("guide/links.md")]
#[doc = include_str!("../docs/performance.md")]
pub mod performance {}
