# effnet_aot::effnet_aot     the operators on tensors; needs libtorch
# effnet_aot::effnet_aot_c   the C API of <effnet_aot/c_api.h>; needs nothing, and serves C projects, too
#
#   find_package(effnet_aot CONFIG REQUIRED)   # -DCMAKE_PREFIX_PATH=$(python -c "import effnet_aot; print(effnet_aot.cmake_prefix_path)")
#   target_link_libraries(app PRIVATE effnet_aot::effnet_aot)
#
# libtorch is the consumer's to bring. It is not looked for here: the Torch package of a CUDA build of torch insists on the
# CUDA toolkit, which this library does not need. Without that package, see examples/cpp/CMakeLists.txt.
cmake_minimum_required(VERSION 3.18)

get_filename_component(_effnet_aot_root "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)

if(NOT TARGET effnet_aot::effnet_aot)
  add_library(effnet_aot::effnet_aot SHARED IMPORTED)
  set_target_properties(effnet_aot::effnet_aot PROPERTIES
    IMPORTED_LOCATION "${_effnet_aot_root}/lib/libeffnet_aot.so"
    IMPORTED_SONAME libeffnet_aot.so
    INTERFACE_INCLUDE_DIRECTORIES "${_effnet_aot_root}/include"
    # Calls through the dispatcher name no symbol of the library, and many toolchains link with --as-needed.
    INTERFACE_LINK_OPTIONS "LINKER:--push-state,--no-as-needed,${_effnet_aot_root}/lib/libeffnet_aot.so,--pop-state")
  set_property(TARGET effnet_aot::effnet_aot PROPERTY INTERFACE_COMPILE_FEATURES cxx_std_17)

  add_library(effnet_aot::effnet_aot_c SHARED IMPORTED)
  set_target_properties(effnet_aot::effnet_aot_c PROPERTIES
    IMPORTED_LOCATION "${_effnet_aot_root}/lib/libeffnet_aot_c.so"
    IMPORTED_SONAME libeffnet_aot_c.so
    INTERFACE_INCLUDE_DIRECTORIES "${_effnet_aot_root}/include")
endif()

unset(_effnet_aot_root)
