# Sourced by run.sh and race.sh, which set `core` and `here`: objects are compiled once for a source, all headers, the
# compiler and its flags, and kept in build/objects. Those that nothing has used for a month are removed.
kept=$here/../../build/objects
mkdir -p "$kept"
find "$kept" -name '*.o*' -mtime +30 -delete
inputs=$({ "${CXX:-g++}" --version; cat "$core"/*.h "$here"/*.h; } | sha256sum)

# name_object SOURCE COMPILER FLAGS...: set `object` to where its object is, or will be.
name_object() {
    key=$({ echo "$inputs" "$@"; cat "$1"; } | sha256sum | cut -c 1-24)
    object=$kept/$(basename "$1" .cpp)-$key.o
}

# compile_object OBJECT SOURCE COMPILER FLAGS...: compile it unless it is there; others may be doing so as well.
compile_object() {
    made=$1 source=$2
    shift 2
    if [ -e "$made" ]; then
        touch -c "$made"
    else
        "$@" -c "$source" -o "$made.$$" && mv "$made.$$" "$made"
    fi
}
