"""What the reference system's tests and known failures ask of us, row by row.

A test is named after its row: H typed channels, P the transport, X between processes, S what is easy to
miss, F the reference system's failures. Each test says what its row expects, and where we differ.

    rows                               where
    H01-H04, H08-H10, H13-H19          test_typed
    H05-H07, P16-P23, S16-S19, F9      test_receiver_set (F9 as F09)
    H11, H12                           test_opaque
    H25, S34                           test_async
    R01-R10, S29-S31, F10              test_router
    P01-P15, P26-P34                   test_transport
    P24, P25, X01-X06                  test_processes
    S01-S09, S14, S20-S28, S33         test_semantics
    H20-H24, P35, P36, S32             test_shared_memory
    F1-F8, F11-F13                     test_findings (as F01 ...); F13 of typed channels: tests.typed

Not here, because nothing of ours could be tested so:

    X07                                another operating system's handles
    S10-S13                            fragments of large messages: ours go in one packet. What they are to guard
                                       against is in P11, P14, P15, P33, P34, F01 and F02
    S15                                a deadline that signals don't move: in F07
    S35                                the end of the interpreter: in S06, by processes that end and are killed, and
                                       for routers in test_router
"""
