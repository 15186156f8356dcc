//! Lines of text and names.

/// A list item in lines of at most 110 characters.
pub fn wrapped(sentence: &str) -> String {
    let (mut text, mut length) = ("-".to_owned(), 1);
    for word in sentence.split_whitespace() {
        let size = word.chars().count() + 1;
        if length + size > 110 {
            text.push_str("\n ");
            length = 1;
        }
        text.push(' ');
        text.push_str(word);
        length += size;
    }
    text.push('\n');
    text
}

/// The first characters of a name that is too long.
pub fn shortened(name: &str, width: usize) -> String {
    if name.chars().count() <= width {
        name.to_owned()
    } else {
        name.chars().take(width.saturating_sub(1)).chain(['…']).collect()
    }
}
